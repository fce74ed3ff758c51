"""Large pictures without their end are refused early, as preprocess would refuse them, and nothing else is."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StageError
from pipelines.images import early
from pipelines.images.decode import open_picture
from pipelines.images.parts import ImagePart

PARAM = "messages[0].content[1].image_url.url"


def large(kind: str) -> bytes:
    """Noise, which no format makes small: more than a million characters of base64."""
    noise = np.random.default_rng(1).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **({"quality": 99} if kind == "JPEG" else {}))
    assert len(file.getvalue()) > 800_000
    return file.getvalue()


@pytest.fixture(scope="module", params=["JPEG", "PNG"])
def whole(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    return request.param, large(request.param)


def look(data: bytes, kind: str) -> None:
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    early.refuse_cut_off([ImagePart(PARAM, uri, "auto")])


def test_without_its_end_it_is_refused_as_preprocess_does(whole: tuple[str, bytes]) -> None:
    kind, data = whole
    for cut in (data[:-2000], data[:-20], data[:-19], data[: 9 * len(data) // 10]):
        with pytest.raises(StageError) as here:
            look(cut, kind)
        with pytest.raises(StageError) as there:
            open_picture(cut, param=PARAM, max_pixels=10_000_000)
        assert "cut off before its end" in str(here.value)
        assert (str(here.value), here.value.code, here.value.param) == (str(there.value), "invalid_image", PARAM)


def test_a_whole_one_is_not_read(whole: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, data = whole
    monkeypatch.setattr(early, "held", None)  # all of it is decoded by nobody
    look(data, kind)
    look(data + b"some bytes that are nobody's", kind)


def test_one_whose_end_is_far_from_the_last_byte_is_whole(whole: tuple[str, bytes]) -> None:
    """As cameras write it, with a film or a preview after it."""
    kind, data = whole
    look(data + bytes(10_000), kind)


def test_others_are_left_to_preprocess(whole: tuple[str, bytes]) -> None:
    kind, data = whole
    look(data[:100_000], kind)  # small
    look(large("BMP")[:-2000], "BMP")
    look(b"GIF89a" + bytes(2_000_000), "GIF")
    early.refuse_cut_off([ImagePart(PARAM, "https://example.com/" + "x" * 2_000_000, "auto")])
    early.refuse_cut_off([ImagePart(PARAM, "data:image/png;base64," + "é" * 2_000_000, "auto")])
    early.refuse_cut_off([ImagePart(PARAM, "x" * 2_000_000, "auto")])
