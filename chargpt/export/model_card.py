"""The model card of an exported folder: the network, how to use it, its training and its loss."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

import chargpt
from chargpt.checkpoints import validation_loss
from chargpt.text_generator import TextGenerator

STANDARD = "Transformers loads it\nwithout additional code."
OWN_CODE = """Its code is in this
folder (chargpt's, MIT license); `trust_remote_code=True` allows Transformers to run it."""


def model_card(generator: TextGenerator, checkpoint: dict[str, Any], own_code: bool) -> str:
    """README.md of the folder: the model, its training and its loss."""
    gpt = generator.gpt
    T, V = gpt.config.block_size, len(generator.vocabulary)
    corpus, training = describe_training(checkpoint)
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    code, trust = (OWN_CODE, ", trust_remote_code=True") if own_code else (STANDARD, "")
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [character-level, chargpt]
---

# A character-level GPT trained on {corpus}

A decoder-only transformer that predicts the next character: {parameters:,} parameters, a vocabulary
of {V} characters and a context of {T}. Exported by chargpt {chargpt.__version__}. {code}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
prompt = tokenizer({json.dumps(generator.opening)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0]))
```

Each token is one character, and there are no special tokens. A prompt needs at least one character,
and a character that is not in the vocabulary is an error. Prompt and generated text together can
have at most {T} characters.

{training}"""


def describe_training(checkpoint: dict[str, Any]) -> tuple[str, str]:
    """The name of the corpus, and the sections of the model card on training and loss."""
    model, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    name = str(data.get("corpus_name") or data.get("corpus") or "an unknown text")
    path, step = Path(name.replace("\\", "/").removesuffix("/input.txt")), checkpoint["global_step"]
    corpus = path.name  # without its folder, which is private
    if origin := checkpoint.get("origin"):
        return corpus, f"## Training\n\n{origin}\n"
    linked = {"block_size", "seed", "_instantiator"}
    local = {"data_dir", "fallback_corpus", "corpus_name"}  # specific to the training machine
    local |= {"corpus_digest", "corpus_bytes", "train_characters"}  # found out by `fit`
    local |= {"val_corpus_name", "val_corpus_digest", "val_corpus_bytes"}
    settings = {
        "seed_everything": model.get("seed"),
        "model": {name: value for name, value in model.items() if name not in linked},
        "data": {k: v for k, v in data.items() if k not in (linked - {"block_size"}) | local},
    }
    settings["data"]["corpus"] = corpus
    if val_corpus := data.get("val_corpus"):
        settings["data"]["val_corpus"] = Path(str(val_corpus).replace("\\", "/")).name
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        corpus,
        f"""\
## Training

Trained for {step:,} steps on {corpus}, with the settings below in `settings.yaml`:

    chargpt fit --config settings.yaml --trainer.max_steps {step}

```yaml
{text}```

Trainer settings (precision, devices, time limits) are not included.

## Loss

{describe_loss(checkpoint)}
""",
    )


def describe_loss(checkpoint: dict[str, Any]) -> str:
    """The validation loss of these exact weights, if they have been validated."""
    loss = validation_loss(checkpoint)
    if loss is None:
        return "The checkpoint records no loss of these weights on a whole validation split."
    separate = checkpoint["datamodule_hyper_parameters"].get("val_corpus")
    split = "a separate text" if separate else "the part of the text after the training part"
    return f"""\
Validation loss: **{loss:.4f}** nats per character ({loss / math.log(2):.4f} bits), the mean over
the whole validation split, {split}: every
character but the first is predicted exactly once, in consecutive sequences of block_size
characters, without dropout."""
