"""Keys: from the environment and files, and what is never said of them."""

import logging
import os

import pytest

from gateway import cli, keys
from gateway.keys import CHECK_S, SHORTEST, Keys, forget_secrets, line_of, new_key
from gateway.ratelimit import Limits
from gateway.settings import SettingsError

ONE, TWO, THREE = (new_key() for _ in range(3))


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def from_file(path, clock=None, **environ):
    return Keys.from_env({keys.API_KEYS_FILE: str(path), **environ}, clock=clock or Clock())


def name_of(found, key):
    match = found.find(key)
    return match and match.name


def test_without_any_nothing_is_asked_for():
    assert not Keys.from_env({}).required
    assert not Keys.from_env({keys.API_KEYS: "", keys.ADMIN_KEY: ""}).required
    assert not Keys.from_env({keys.ADMIN_KEY: ONE}).required
    assert Keys.from_env({}).find(ONE) is None
    assert not Keys.from_env({}).is_admin("")


def test_a_list_of_keys():
    found = Keys.from_env({keys.API_KEYS: f"{ONE}, alice:{TWO},"}, Limits(7, 8))
    assert found.required
    assert (name_of(found, ONE), name_of(found, TWO), name_of(found, THREE)) == ("key-1", "alice", None)
    assert found.find(TWO).limits == Limits(7, 8)
    for near in ("", ONE[:-1], ONE + "x", ONE.upper(), f" {ONE}", f"alice:{TWO}", "\udcff", "é" * 20):
        assert found.find(near) is None


def test_an_admin_key_opens_everything_and_others_administer_nothing(tmp_path):
    file = tmp_path / "admin"
    file.write_text(line_of("root", THREE, Limits()))
    found = Keys.from_env({keys.API_KEYS: ONE, keys.ADMIN_KEY: TWO, keys.ADMIN_KEY_FILE: str(file)})
    assert [found.is_admin(key) for key in (ONE, TWO, THREE, "")] == [False, True, True, False]
    assert [name_of(found, key) for key in (ONE, TWO, THREE)] == ["key-1", "admin", "root"]


def test_a_file_of_digests(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        f"# who may\n\n{line_of('alice', ONE, Limits(60, 2))}  # pays\n{line_of('bob', TWO, Limits())}\r\n"
        f"carol\tsha256:{keys.digest_of(THREE).hex().upper()} concurrency=0\n"
    )
    assert ONE not in file.read_text()
    found = Keys.from_env({keys.API_KEYS_FILE: str(file)}, Limits(5, 5))
    assert (found.find(ONE).name, found.find(ONE).limits) == ("alice", Limits(60, 2))
    assert (found.find(TWO).name, found.find(TWO).limits) == ("bob", Limits(5, 5))
    assert (found.find(THREE).name, found.find(THREE).limits) == ("carol", Limits(5, 0))


SECRET = "hunter2hunter2hunter2"


@pytest.mark.parametrize(
    "line",
    [
        SECRET,
        f"alice {SECRET}",
        f"alice sha256:{SECRET}",
        f"sha256:{'0' * 64}",
        f"a/b sha256:{'0' * 64} {SECRET}",
        f"alice sha256:{'0' * 64} {SECRET}=1",
        f"alice sha256:{'0' * 64} rpm=-1",
        f"alice sha256:{'0' * 64} rpm=1 rpm=2",
        f"alice sha256:{'0' * 64} rpm=9999999999",
        f"{'x' * 65} sha256:{'0' * 64}",
    ],
)
def test_a_bad_line_is_told_by_its_place_alone(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# one\n{line}\n")
    with pytest.raises(SettingsError, match=r"TRIPTYCH_API_KEYS_FILE: line 2 of .*keys must be NAME sha256:HEX") as bad:
        from_file(file)
    assert SECRET not in str(bad.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: it does not exist"),
        (b"# nobody\n", "has no key"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"#" * (1024 * 1024 + 1), "is larger than"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}".encode(), "line 2 of .* has the name of a line before it"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, why):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^TRIPTYCH_API_KEYS_FILE: .*{why}"):
        from_file(file)
    with pytest.raises(SettingsError, match=r"^TRIPTYCH_API_KEYS_FILE"):
        from_file(tmp_path)  # a folder


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("hunter2", "entry 1: a key is 16 or more visible ASCII characters"),
        (f"{ONE},bob:hunter2", "entry 2: a key is 16 or more"),
        (f"{ONE},a b:{SECRET}", "entry 2: a name is"),
        (f"a:{SECRET},a:{ONE}", "entry 2 has the name of one before it"),
        (" , ,", "has no key"),
        (f"a:{SECRET} {SECRET}", "entry 1: a key is"),
    ],
    ids=["short", "second short", "name", "same name", "none", "two in one"],
)
def test_a_bad_list_is_told_by_its_place_alone(value, why):
    with pytest.raises(SettingsError, match=f"^TRIPTYCH_API_KEYS:? {why}") as bad:
        Keys.from_env({keys.API_KEYS: value})
    assert not any(secret in str(bad.value) for secret in ("hunter2", ONE, SECRET))
    with pytest.raises(SettingsError, match=r"^TRIPTYCH_ADMIN_KEY: a key is"):
        Keys.from_env({keys.ADMIN_KEY: "hunter2"})


def test_a_change_is_picked_up_and_the_file_is_not_looked_at_all_the_time(tmp_path):
    clock = Clock()
    file = tmp_path / "keys"
    file.write_text(line_of("alice", ONE, Limits()))
    found = from_file(file, clock)
    file.write_text(line_of("bob", TWO, Limits(3)))
    assert (name_of(found, ONE), name_of(found, TWO)) == ("alice", None)  # within the second
    clock.seconds += CHECK_S
    assert (name_of(found, ONE), name_of(found, TWO)) == (None, "bob")
    other = tmp_path / "other"
    other.write_text(line_of("bob", ONE, Limits(3)))  # as long, and as old
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    clock.seconds += CHECK_S
    assert (name_of(found, ONE), name_of(found, TWO)) == ("bob", None)


def test_a_file_that_went_bad_is_reported_once_and_what_held_holds(tmp_path, caplog):
    clock = Clock()
    file = tmp_path / "keys"
    file.write_text(line_of("alice", ONE, Limits()))
    found = from_file(file, clock)

    def told():
        caplog.clear()
        for _ in range(3):
            clock.seconds += CHECK_S
            assert name_of(found, ONE) == "alice"
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        file.write_text(f"alice {SECRET}\n")
        (line,) = told()
        assert "line 1" in line
        assert SECRET not in line
        file.unlink()
        (line,) = told()
        assert "it does not exist" in line
        file.write_text(line_of("alice", ONE, Limits()) + "\n")
        assert told() == []
        file.write_text("# nobody any more\n")
        clock.seconds += CHECK_S
        assert name_of(found, ONE) is None
        assert found.required  # and does not open the gateway


def test_nothing_shows_a_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(line_of("alice", TWO, Limits()))
    found = from_file(file, TRIPTYCH_API_KEYS=ONE, TRIPTYCH_ADMIN_KEY=THREE)
    for key in (ONE, TWO, THREE):
        match = found.find(key)
        for shown in (repr(match), str(match), repr(found), str(vars(found)), repr(vars(found))):
            assert key not in shown
            assert keys.digest_of(key).hex() not in shown
            assert repr(keys.digest_of(key)) not in shown


def test_children_inherit_no_key():
    environ = {keys.API_KEYS: ONE, keys.ADMIN_KEY: TWO, keys.API_KEYS_FILE: "/a", "PATH": "/bin"}
    forget_secrets(environ)
    assert environ == {keys.API_KEYS_FILE: "/a", "PATH": "/bin"}


def test_every_key_is_compared_whichever_matches(monkeypatch):
    found = Keys.from_env({keys.API_KEYS: f"{ONE},{TWO},{THREE}"})
    compared = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: (compared.append(b), compare(a, b))[1])
    for key in (ONE, THREE, "nobody's"):
        compared.clear()
        found.find(key)
        assert len(compared) == 3


# The command.


def test_the_command_makes_a_key_and_its_line(capsys, tmp_path):
    assert cli.main(["key", "alice", "--rpm", "60", "--concurrency", "4"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    assert key.startswith("sk-")
    assert len(key) > 40
    (tmp_path / "keys").write_text(line)
    match = from_file(tmp_path / "keys").find(key)
    assert (match.name, match.limits) == ("alice", Limits(60, 4))
    assert cli.main(["key", "alice"]) == 0
    assert capsys.readouterr().out.splitlines()[0] != key


def test_the_command_hashes_a_given_key(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", iter_lines(f"{SECRET}\n"))
    assert cli.main(["key", "bob", "--stdin"]) == 0
    line = capsys.readouterr().out.strip()
    assert SECRET not in line
    (tmp_path / "keys").write_text(line)
    assert name_of(from_file(tmp_path / "keys"), SECRET) == "bob"
    monkeypatch.setattr("sys.stdin", iter_lines("x" * (SHORTEST - 1)))
    assert cli.main(["key", "bob", "--stdin"]) == 1
    assert "16 or more" in capsys.readouterr().err
    assert cli.main(["key", "a b"]) == 1
    assert "a key's name is" in capsys.readouterr().err


class iter_lines:
    def __init__(self, text):
        self.text = text

    def readline(self):
        return self.text
