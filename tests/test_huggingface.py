"""The folder for Hugging Face transformers, against the real transformers and tokenizers."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

import chargpt
from chargpt.export import huggingface
from chargpt.export.huggingface import ExportError, export, whole_folder
from chargpt.model import GPT, GPTConfig
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

CONFIGS = Path(__file__).parents[1] / "configs"
SHAKESPEARE = Path(os.environ.get("CHARGPT_DATA_DIR", ""), "tiny-shakespeare", "input.txt")
NOTHING_KNOWN = {"hyper_parameters": {}, "datamodule_hyper_parameters": {}, "global_step": 0}
CHARACTERS = "".join(sorted("\n !?abcdefghijklmnopqrstuvwxyzé字😀\0\r\t\u0301\u200b"))
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def transformers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("tokenizers", reason="tokenizers are not installed")
        yield pytest.importorskip("transformers", reason="transformers are not installed")


@pytest.fixture(scope="module")
def real_text() -> str:
    """Tiny Shakespeare where it is at hand, else the English text that comes with Python."""
    if not SHAKESPEARE.is_file():
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    return SHAKESPEARE.read_bytes().decode()


def generator_of(characters: str = CHARACTERS, **settings) -> TextGenerator:
    """A network with weights so large that every part matters."""
    sizes = dict(block_size=24, n_embd=len(characters) + 6, n_head=2, n_layer=2)
    sizes["n_embd"] += -sizes["n_embd"] % 4
    gpt = GPT(GPTConfig(**sizes | settings), len(characters))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return TextGenerator(gpt, Vocabulary(characters)).eval()


def assert_same(ours: TextGenerator, theirs, tokenizer, prompt: str) -> None:
    """Logits over whole windows, and the likeliest text of block_size characters."""
    B, V = ours.gpt.config.block_size, len(ours.vocabulary)
    ids = torch.randint(V, (4, B), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.gpt(ids), rtol=0, atol=1e-4)
    n = B - len(prompt)
    written = theirs.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=n
    )
    assert tokenizer.decode(written[0]) == ours.complete(prompt, max_new_chars=n, temperature=0)


def load(transformers, folder: Path):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("config", ["base", "laptop"])
def test_a_trained_network_is_the_same_there(
    transformers, real_text, command, tmp_path, monkeypatch, config
):
    (tmp_path / "text.txt").write_bytes(real_text.encode())
    result = command(
        tmp_path,
        "fit",
        f"--config={CONFIGS / config}.yaml",
        "--data.corpus=text.txt",
        "--data.val_fraction=0.001",
        "--data.batch_size=2",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=2",
        "--trainer.accelerator=cpu",
    )
    assert result.status == 0, result.err
    result = command(tmp_path, "export", "--to=huggingface", "--output=folder")
    assert (result.status, result.out) == (0, ""), result.err
    monkeypatch.chdir(tmp_path)
    theirs, tokenizer = load(transformers, tmp_path / "folder")
    assert_same(chargpt.load(), theirs, tokenizer, prompt="The ")
    assert tokenizer.decode(tokenizer(real_text).input_ids) == real_text


SWITCHES = {
    "textbook": {},
    "no bias": dict(bias=False),
    "GPT-2's own": dict(qkv_bias=True, activation="gelu"),
    "relu2": dict(activation="relu2"),
    "rotary": dict(position="rotary"),
    "rotary, query, key and value alone with bias": dict(
        position="rotary", bias=False, qkv_bias=True
    ),
    "rotary, plain norm": dict(position="rotary", norm="plain", activation="gelu"),
    "laptop": dict(position="rotary", norm="plain", bias=False, activation="relu2"),
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_is_the_same_there(transformers, tmp_path, switches):
    ours = generator_of(**switches)
    export(ours, NOTHING_KNOWN, tmp_path / "new" / "folder", "float16")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    assert os.listdir(tmp_path / "new") == ["folder"]
    theirs, tokenizer = load(transformers, tmp_path / "new" / "folder")
    assert_same(ours, theirs, tokenizer, prompt="the ")
    assert theirs.config.bos_token_id is theirs.config.eos_token_id is None


def test_the_tokenizer_gives_back_every_text(transformers, tmp_path):
    ours = generator_of()
    export(ours, NOTHING_KNOWN, tmp_path / "folder", "float16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    random.seed(3)
    for _ in range(1000):
        text = "".join(random.choices(CHARACTERS, k=random.randrange(1, 40)))
        ids = tokenizer(text).input_ids
        assert ids == ours.vocabulary.encode(text).tolist()
        assert tokenizer.decode(ids) == text
    with pytest.raises(Exception, match="vocabulary"):
        tokenizer("ü")


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_pipeline_writes_without_any_setting(transformers, tmp_path, position):
    export(generator_of(position=position), NOTHING_KNOWN, tmp_path / "folder", "float16")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "folder"))
    text = pipeline("the ")[0]["generated_text"]
    assert text.startswith("the ")
    assert len(text) == 4 + 12


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        (dict(ngrams={3: 7}, position="rotary"), "n-gram tables.*\n.*--model.ngrams null"),
        (dict(norm="plain"), "learned positions and a norm.*\n.*--model.position rotary"),
        (dict(n_embd=16), "bias of the head.*\n.*--model.bias false, or --model.n_embd of 38"),
    ],
    ids=["tables", "norm on embeddings", "few channels"],
)
def test_what_no_architecture_holds_is_refused(tmp_path, switches, reason):
    with pytest.raises(ExportError, match=reason):
        export(generator_of(**switches), NOTHING_KNOWN, tmp_path / "folder", "float16")
    assert not os.listdir(tmp_path)


def test_a_setting_that_has_come_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "HELD", huggingface.HELD - {"activation"})
    export(generator_of(), NOTHING_KNOWN, tmp_path / "folder", "float16")
    with pytest.raises(ExportError, match="activation gelu"):
        export(generator_of(activation="gelu"), NOTHING_KNOWN, tmp_path / "other", "float16")


# ---- the model card ----


def test_the_model_card_says_what_is_known(trained, command, tmp_path):
    run = trained / "lightning_logs" / "version_0" / "checkpoints"
    (best,) = run.glob("*val_loss*")
    flags = ["--to=huggingface", f"--ckpt_path={best}"]
    assert command(tmp_path, "export", *flags, "--output=sub/folder").status == 1  # few channels
    assert not os.listdir(tmp_path)
    checkpoint = torch.load(best, weights_only=True)
    generator = generator_of()
    export(generator, checkpoint, tmp_path / "a", "float16")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"**{best.stem.split('=')[-1]}** nats" in card
    assert "text.txt" in card
    assert "n_embd: 8" in card
    assert str(trained) not in card  # of the machine
    for change in ({"validated_step": 0}, {"limit_val_batches": 2}):
        export(generator, checkpoint | change, tmp_path / str(change), "float16")
        card = (tmp_path / str(change) / "README.md").read_text(encoding="utf-8")
        assert "not validated" in card


# ---- all or nothing ----


def test_a_folder_that_holds_something_or_a_file_stays_as_it_is(trained, command, tmp_path):
    generator = generator_of()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name}.* folder"):
            export(generator, NOTHING_KNOWN, tmp_path / name, "float16")
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    export(generator, NOTHING_KNOWN, tmp_path / "empty", "float16")
    assert set(os.listdir(tmp_path / "empty")) == FILES
    assert set(os.listdir(tmp_path)) == {"full", "file", "empty"}
    with pytest.raises(OSError):
        export(generator, NOTHING_KNOWN, tmp_path / "file" / "folder", "float16")


def test_nothing_is_left_of_a_folder_that_failed(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", no_space)
    with pytest.raises(OSError, match="No space"):
        export(generator_of(), NOTHING_KNOWN, tmp_path / "folder", "float16")
    assert not os.listdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder"):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_json_files_hold_characters_as_they_are(tmp_path):
    export(generator_of(), NOTHING_KNOWN, tmp_path / "folder", "float16")
    text = (tmp_path / "folder" / "tokenizer.json").read_text(encoding="utf-8")
    assert "字" in text
    assert list(json.loads(text)["model"]["vocab"]) == list(CHARACTERS)
