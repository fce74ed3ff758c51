"""A repository whose model is its own code, as moondream2's is: two modules, weights and a tokenizer, in a folder.

Its class is made as that one's: `query` is a property that gives an inner model's method, the constructor does not call
`post_init`, a buffer is computed when the model is made and is not among the weights, and its tokenizer is another
repository's, by name.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.engine.remote_files import asked_for, from_folder

END = "<|endoftext|>"
PIECES = ["", " red", " 日本", "é", "😀 ", ",", "\n", " the cat's", " a", "  b", END, " x", "-", "ing ", " Ünï", "."]

MODEL = """
import torch
from tokenizers import Tokenizer
from torch import nn

PIECES = {pieces!r}


class Inner(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokenizer = Tokenizer.from_pretrained("stand-in/words")
        self.look = nn.Linear(12, width)
        self.read = nn.Embedding(300, width)
        self.told = nn.Embedding(len(PIECES), width)
        self.say = nn.Linear(width, len(PIECES))
        self.register_buffer("turn", torch.linspace(-3, 3, width), persistent=False)

    def encode_image(self, image):
        small = image.convert("RGB").resize((2, 2))
        return torch.tensor([*small.tobytes()]).to(self.turn) / 255

    def state(self, image, question):
        ids = self.tokenizer.encode(question).ids
        place = torch.arange(1, len(ids) + 1).to(self.turn)[:, None]
        seen = 0 if image is None else self.look(self.encode_image(image) - 0.5) * 12
        return seen + (self.read(torch.tensor(ids, device=self.turn.device)) * torch.cos(place)).sum(0)

    def query(self, image=None, question=None, reasoning=False, stream=False, settings=None):
        if reasoning:
            raise ValueError("reasoning was not asked for")
        if question.startswith("fail"):
            raise RuntimeError("the question failed")
        if settings is not None and settings["variant"] is not None:  # as moondream2 reads it: not to be left out
            raise ValueError("no variant was asked for")
        settings = settings or {{}}
        pieces = self.pieces(image, question, settings.get("max_tokens", 768), settings.get("temperature", 0.5))
        return {{"answer": pieces if stream else "".join(pieces)}}

    def pieces(self, image, question, most, temperature):
        state = self.state(image, question)
        for count in range(most):
            scores = self.say(torch.sin(state + self.turn))
            scores[0] = -1e9 if count < 12 else scores[0]
            if temperature == 0:
                token = int(scores.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(scores / temperature, -1), 1))
            if not token or count == 40:
                return
            if question.startswith("break") and count == 5:
                raise RuntimeError("the answer failed")
            if question.startswith("leave") and count == 5:
                raise SystemExit("its code wants to leave")
            yield PIECES[token]
            state = torch.roll(state, 1) + self.told.weight[token]
"""

WRAPPER = """
from transformers import PretrainedConfig, PreTrainedModel

from .inner_stand_in import Inner


class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

    def __init__(self, width=24, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config.width)

    @property
    def query(self):
        return self.model.query
"""


def build(home: Path, *, wrapper: str = WRAPPER) -> Path:
    home.mkdir(parents=True)
    names = {"AutoConfig": "moondream_stand_in.StandInConfig", "AutoModelForCausalLM": "moondream_stand_in.StandIn"}
    config = {"model_type": "stand_in", "width": 24, "architectures": ["StandIn"], "auto_map": names}
    (home / "config.json").write_text(json.dumps(config))
    (home / "moondream_stand_in.py").write_text(wrapper)
    source = MODEL.format(pieces=PIECES)
    (home / "inner_stand_in.py").write_text(source)
    (words,) = asked_for(home).values()
    tokenizer().save(str(words))
    scope: dict = {}
    exec(source, scope)
    torch.manual_seed(0)
    with from_folder(home):
        inner = scope["Inner"](24)
    save_file({f"model.{name}": tensor for name, tensor in inner.state_dict().items()}, home / "model.safetensors")
    tokenizer().save(str(home / "tokenizer.json"))
    return home


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    made.train_from_iterator([" the cat's red 日本 a b ing what colour is"] * 3, trainer)
    return made
