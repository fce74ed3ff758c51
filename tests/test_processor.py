"""A model's processor, as the preprocess stage calls it: what transformers' own gives, and whose every token is."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.images.features import pack, unpack
from pipelines.images.processor import MAX_ASPECT, Processor
from pipelines.prompt import render
from pipelines.template import ChatTemplate
from tests import vision

SEVERAL = [name for name in vision.NAMES if name != "kosmos2"]  # which takes one
SIZES = [(40, 40), (90, 30), (31, 57)]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {name: vision.home(name, folder / name) for name in vision.NAMES}


@pytest.fixture(scope="module")
def processors(homes):
    return {name: Processor.load(home) for name, home in homes.items()}


def pictures(count, first=0):
    return [vision.picture(first + index, SIZES[index % len(SIZES)]) for index in range(count)]


def chat(home, processor, count, text="What is it?"):
    """A rendered chat with so many pictures among its words."""
    image = {"type": "image_url", "image_url": {"url": "", "detail": "auto"}}
    parts = [part for index in range(count) for part in ({"type": "text", "text": f"No. {index}"}, image)]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if count else text}
    template = ChatTemplate.load(home)
    form = AnswerFormat.of(template)
    return render(template, form, [message], None, image_token=processor.image_token, reserved=processor.reserved)


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for name in vision.NAMES for count in (0, 1, 3) if count < 2 or name in SEVERAL]
)
def test_gives_what_the_models_own_processor_gives(homes, processors, name, count):
    home, processor = homes[name], processors[name]
    rendered = chat(home, processor, count)
    ids, features = processor.run(rendered, pictures(count))
    wanted = {key: value.numpy() for key, value in vision.inputs(home, rendered, pictures(count)).items()}
    assert ids == wanted.pop("input_ids")[0].tolist()
    assert wanted.pop("attention_mask").all()
    if not count:
        assert features is None
        assert not any(array.any() for array in wanted.values())  # types of tokens, all of which are text
        return
    assert features is not None
    assert features.arrays.keys() == wanted.keys()
    assert "pixel_values" in wanted
    for key, array in wanted.items():
        assert features.arrays[key].dtype == array.dtype
        assert np.array_equal(features.arrays[key], array)
    travelled = unpack(pack(features))
    assert travelled.identity == features.identity
    assert all(np.array_equal(travelled.arrays[key], array) for key, array in wanted.items())


@pytest.mark.parametrize("size", [(40, 40), (300, 200)])  # the larger is known by what the model sees, if that is less
@pytest.mark.parametrize("name", vision.NAMES)
def test_identity_is_the_tokens_and_the_pictures(homes, processors, name, size):
    processor = processors[name]
    rendered = chat(homes[name], processor, 1)

    def identity(picture):
        ids, features = processor.run(rendered, [picture])
        assert len(features.identity) == len(ids)
        return np.array(ids), np.array(features.identity)

    ids, one = identity(vision.picture(1, size))
    assert (identity(vision.picture(1, size))[1] == one).all()
    seen = one < 0
    assert (one[~seen] == ids[~seen]).all()
    assert len(set(one[seen])) == 1
    other_ids, other = identity(vision.picture(2, size))
    assert (other_ids == ids).all()
    assert (other[~seen] == one[~seen]).all()
    assert (other[seen] < 0).all()
    assert not set(other[seen]) & set(one[seen])
    changed = vision.picture(1, size)
    middle = (size[0] // 2, size[1] // 2)
    changed.putpixel(middle, tuple((value + 128) % 256 for value in changed.getpixel(middle)))
    assert not set(identity(changed)[1][seen]) & set(one[seen])


@pytest.mark.parametrize("name", vision.NAMES)
def test_the_tokens_that_stand_for_a_picture_are_those_that_the_model_replaces(homes, processors, name):
    ids, features = processors[name].run(chat(homes[name], processors[name], 1), pictures(1))
    stands = [number < 0 for number in features.identity]
    if name == "kosmos2":
        assert stands == features.arrays["image_embeds_position_mask"][0].astype(bool).tolist()
    else:
        config = json.loads((homes[name] / "config.json").read_text())
        token = config.get("image_token_id", config.get("image_token_index"))
        assert stands == [token_id == token for token_id in ids]


@pytest.mark.parametrize("name", SEVERAL)
def test_every_picture_has_its_own_places(homes, processors, name):
    processor = processors[name]
    rendered = chat(homes[name], processor, 3)
    one, two, three = pictures(3)

    def numbers(*given):
        _, features = processor.run(rendered, given)
        found = [number for number in features.identity if number < 0]
        return [number for index, number in enumerate(found) if index == 0 or number != found[index - 1]]

    first, second, third = numbers(one, two, three)
    assert len({first, second, third}) == 3
    assert numbers(three, one, two) == [third, first, second]
    assert len(numbers(one, one, one)) == 1


@pytest.mark.parametrize("name", vision.NAMES)
def test_prompts_that_begin_alike_are_alike_as_far_as_they_do(homes, processors, name):
    processor = processors[name]
    _, one = processor.run(chat(homes[name], processor, 1, "What is it?"), pictures(1))
    _, two = processor.run(chat(homes[name], processor, 1, "Where is it?"), pictures(1))
    last = max(index for index, number in enumerate(one.identity) if number < 0)
    assert one.identity[: last + 2] == two.identity[: last + 2]
    assert one.identity != two.identity


def test_a_picture_of_another_shape_with_the_same_bytes(homes, processors):
    processor = processors["llava"]
    rendered = chat(homes["llava"], processor, 1)
    flat = vision.picture(1, (40, 20))
    turned = Image.frombytes("RGB", (20, 40), flat.tobytes())
    assert processor.run(rendered, [flat])[1].identity != processor.run(rendered, [turned])[1].identity


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize(("places", "given"), [(1, 0), (0, 1), (2, 3), (3, 2)])
def test_as_many_places_as_pictures(homes, processors, name, places, given):
    with pytest.raises(StageError, match="places for") as refused:
        processors[name].run(chat(homes[name], processors[name], places), pictures(given), param="messages")
    assert (refused.value.param, refused.value.code) == ("messages", "invalid_request")


def test_a_model_of_one_picture(homes, processors):
    with pytest.raises(StageError, match="takes one picture; there are 2"):
        processors["kosmos2"].run(chat(homes["kosmos2"], processors["kosmos2"], 1), pictures(2))


@pytest.mark.parametrize("name", vision.NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (4, 3), (1, MAX_ASPECT), (MAX_ASPECT, 1), (700, 500)])
def test_pictures_of_any_size(homes, processors, name, size):
    ids, features = processors[name].run(chat(homes[name], processors[name], 1), [vision.picture(1, size)])
    assert len(features.identity) == len(ids)
    assert np.isfinite(features.arrays["pixel_values"]).all()


@pytest.mark.parametrize("name", vision.NAMES)
@pytest.mark.parametrize("size", [(1, MAX_ASPECT + 1), (4_000_000, 1)])
def test_a_picture_of_one_row_is_refused_before_it_grows(homes, processors, name, size):
    with pytest.raises(StageError, match=f"{size[0]}x{size[1]} pixels is too long"):
        processors[name].run(chat(homes[name], processors[name], 1), [Image.new("RGB", size)])


def test_what_a_processor_refuses_is_the_users_message(homes, processors):
    rendered = chat(homes["qwen3_vl"], processors["qwen3_vl"], 1) + "<|video_pad|>"
    with pytest.raises(StageError, match="no videos were passed") as refused:
        processors["qwen3_vl"].run(rendered, pictures(1), param="messages[0]")
    assert refused.value.param == "messages[0]"


def test_a_word_for_a_picture_that_is_not_the_token_it_becomes(homes, tmp_path):
    """As in Gemma 3, whose templates write where a picture begins."""
    copy_with(homes["gemma3n"], tmp_path, "processor_config.json", processor_class="Gemma3Processor")
    copy_with(homes["gemma3n"], tmp_path, "preprocessor_config.json", image_processor_type="Gemma3ImageProcessor")
    processor = Processor.load(tmp_path)
    assert processor.image_token == "<start_of_image>"
    assert set(processor.reserved) >= {"<start_of_image>", "<image_soft_token>"}
    ids, features = processor.run("a <start_of_image> b <start_of_image>", pictures(2))
    stands = [number for number in features.identity if number < 0]
    assert len(stands) == ids.count(processor.own.image_token_ids[0]) == 8
    assert stands[0] != stands[4]
    assert stands == [stands[0]] * 4 + [stands[4]] * 4


class Older(Processor):
    """As processors are that do not say which picture became which words."""

    def _called(self, rendered, pictures):
        given = super()._called(rendered, pictures)
        del given["text_replacement_offsets"]
        return given


def test_where_pictures_cannot_be_told_apart_each_place_stands_for_all(homes, processors):
    processor = Older(processors["llava"].own, "<image>")
    rendered = chat(homes["llava"], processor, 2)
    one, two, three = pictures(3)

    def number(*given):
        ids, features = processor.run(rendered, given)
        assert [number < 0 for number in features.identity] == [token == 4 for token in ids]
        (found,) = {number for number in features.identity if number < 0}
        return found

    assert number(one, two) == number(one, two)
    assert len({number(one, two), number(two, one), number(one, three), number(three, two)}) == 4


def test_a_processor_that_does_not_say_where_its_picture_is(homes, processors):
    processor = Processor(processors["llava"].own, "")  # as if it wrote the picture's place itself
    with pytest.raises(RuntimeError, match="LlavaProcessor does not say which tokens"):
        processor.sample("<image>")


@pytest.mark.parametrize(
    ("name", "least"), [("llava", 56), ("smolvlm", None), ("qwen3_vl", None), ("gemma3n", 56), ("kosmos2", 56)]
)
def test_how_small_a_picture_may_be_made_before(processors, name, least):
    assert processors[name].least_side == least


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"do_center_crop": False}, {"size": {"longest_edge": 28}}])
def test_where_the_size_is_seen_a_picture_is_not_made_smaller(homes, tmp_path, settings):
    copy_with(homes["llava"], tmp_path, "preprocessor_config.json", **settings)
    assert Processor.load(tmp_path).least_side is None


@pytest.mark.parametrize("name", vision.NAMES)
def test_what_no_text_may_hold(processors, name):
    words = {
        "llava": {"<image>"},
        "smolvlm": {"<image>"},
        "qwen3_vl": {"<|image_pad|>", "<|video_pad|>"},
        "gemma3n": {"<image_soft_token>", "<audio_soft_token>"},
        "kosmos2": {"<image>", "</image>"},
    }
    assert set(processors[name].reserved) == words[name]
    assert processors[name].image_token in {*words[name], ""}
    assert (processors[name].image_token == "") == (name == "kosmos2")


@pytest.mark.parametrize("name", vision.NAMES)
def test_a_sample(homes, processors, name):
    processor = processors[name]
    rendered = chat(homes[name], processor, 1)
    ids, features = processor.sample(rendered)
    assert processor.sample(rendered)[1].identity == features.identity
    assert len(ids) == len(features.identity)
    assert min(features.identity) < 0
    assert features.arrays["pixel_values"].std() > 0.1


@pytest.fixture
def trained(homes, tmp_path):
    """A folder whose tokenizer still cuts and fills, as for its training."""
    copy_with(homes["llava"], tmp_path, "tokenizer_config.json", model_max_length=8, max_length=8, truncation=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    pad = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    tokenizer["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left"} | pad
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_truncation_and_padding_of_a_training_run_are_left_aside(homes, processors, trained):
    rendered = chat(homes["llava"], processors["llava"], 2)
    wanted = processors["llava"].run(rendered, pictures(2))[0]
    assert Processor.load(trained).run(rendered, pictures(2))[0] == wanted


def test_a_folder_that_names_its_processor_by_its_models_type_alone(homes, processors, tmp_path):
    for file in ("processor_config.json", "preprocessor_config.json"):
        copy_with(homes["qwen3_vl"], tmp_path, file, processor_class=None)
    rendered = chat(homes["qwen3_vl"], processors["qwen3_vl"], 1)
    assert (
        Processor.load(tmp_path).run(rendered, pictures(1))[0] == processors["qwen3_vl"].run(rendered, pictures(1))[0]
    )


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("NoSuchProcessor", "NoSuchProcessor"),
        ("WhisperProcessor", "takes no pictures"),
        ("PaliGemmaModel", "no processor"),
    ],
)
def test_a_folder_without_a_processor(homes, tmp_path, named, problem):
    copy_with(homes["llava"], tmp_path, "processor_config.json", processor_class=named)
    with pytest.raises(ValueError, match=problem):
        Processor.load(tmp_path)


def test_several_threads_at_once(homes, processors, trained):
    """Each with its own chat and pictures; what one gets is what it gets alone."""
    folders = homes | {"llava": trained}
    for name, processor in processors.items():
        given = [(chat(homes[name], processor, 1, f"{seed}"), pictures(1, seed)) for seed in range(8)]
        wanted = [processor.run(*each) for each in given]
        fresh = Processor.load(folders[name])
        problems = []

        def work(seed, processor=fresh, given=given, wanted=wanted, problems=problems, name=name):
            try:
                for _ in range(10):
                    ids, features = processor.run(*given[seed])
                    same = ids == wanted[seed][0] and features.identity == wanted[seed][1].identity
                    arrays = wanted[seed][1].arrays
                    if not same or any((features.arrays[key] != arrays[key]).any() for key in arrays):
                        problems.append(f"{name}: {seed} differs")
            except Exception as error:
                problems.append(f"{name}: {error!r}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert problems == []


def copy_with(home, folder, file, **settings):
    """The same folder, with other settings in one file; None takes one out."""
    for source in home.iterdir():
        if not (folder / source.name).exists():
            (folder / source.name).write_bytes(source.read_bytes())
    value = json.loads((folder / file).read_text()) | settings
    (folder / file).write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
