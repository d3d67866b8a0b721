"""Export to Hugging Face, checked with the real transformers and tokenizers libraries."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

import chargpt
from chargpt.export import huggingface
from chargpt.export.huggingface import atomic_folder, export
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.text_generator import TextGenerator
from chargpt.vocabulary import Vocabulary

CONFIGS = Path(__file__).parents[1] / "configs"
SHAKESPEARE = Path(os.environ.get("CHARGPT_DATA_DIR", ""), "tiny-shakespeare", "input.txt")
EMPTY_CHECKPOINT = {
    "hyper_parameters": {},
    "datamodule_hyper_parameters": {},
    "global_step": 0,
    "chargpt": {},
}
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
    """Tiny Shakespeare if available, otherwise the reference manual that ships with Python."""
    if not SHAKESPEARE.is_file():
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    return SHAKESPEARE.read_bytes().decode()


def generator_of(characters: str = CHARACTERS, **settings) -> TextGenerator:
    """A network with random weights, large enough that each part matters."""
    sizes = dict(block_size=24, n_embd=len(characters) + 6, n_head=2, n_layer=2)
    sizes["n_embd"] += -sizes["n_embd"] % 4
    gpt = GPT(GPTConfig(**sizes | settings), len(characters))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return TextGenerator(gpt, Vocabulary(characters)).eval()


def assert_same(generator: TextGenerator, hf_model, tokenizer, prompt: str) -> None:
    """Compare logits over full contexts, and greedy text of block_size characters."""
    T, V = generator.gpt.config.block_size, len(generator.vocabulary)
    ids = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(hf_model(ids).logits, generator.gpt(ids), rtol=0, atol=1e-4)
    n = T - len(prompt)
    output = hf_model.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=n
    )
    expected = generator.complete(prompt, max_new_chars=n, temperature=0)
    assert tokenizer.decode(output[0]) == expected


def load(transformers, folder: Path):
    hf_model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return hf_model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("config", ["base", "laptop"])
def test_an_exported_trained_network_gives_the_same_logits_and_text(
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
    hf_model, tokenizer = load(transformers, tmp_path / "folder")
    assert_same(chargpt.load(), hf_model, tokenizer, prompt="The ")
    assert tokenizer.decode(tokenizer(real_text).input_ids) == real_text


SWITCHES = {
    "textbook": {},
    "no bias": dict(bias=False),
    "GPT-2's own": dict(qkv_bias=True, activation="gelu"),
    "relu2": dict(activation="relu2"),
    "rotary": dict(position="rotary"),
    "rotary, bias on query, key and value only": dict(position="rotary", bias=False, qkv_bias=True),
    "rotary, plain norm": dict(position="rotary", norm="plain", activation="gelu"),
    "laptop": dict(position="rotary", norm="plain", bias=False, activation="relu2"),
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_supported_setting_gives_the_same_logits_and_text(transformers, tmp_path, switches):
    generator = generator_of(**switches)
    export(generator, EMPTY_CHECKPOINT, tmp_path / "new" / "folder", "float16")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    assert os.listdir(tmp_path / "new") == ["folder"]
    hf_model, tokenizer = load(transformers, tmp_path / "new" / "folder")
    assert_same(generator, hf_model, tokenizer, prompt="the ")
    assert hf_model.config.bos_token_id is hf_model.config.eos_token_id is None


def test_the_tokenizer_round_trips_every_text(transformers, tmp_path):
    generator = generator_of()
    export(generator, EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    random.seed(3)
    for _ in range(1000):
        text = "".join(random.choices(CHARACTERS, k=random.randrange(1, 40)))
        ids = tokenizer(text).input_ids
        assert ids == generator.vocabulary.encode(text).tolist()
        assert tokenizer.decode(ids) == text
    with pytest.raises(Exception, match="vocabulary"):
        tokenizer("ü")


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_pipeline_generates_with_default_settings(transformers, tmp_path, position):
    export(generator_of(position=position), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "folder"))
    text = pipeline("the ")[0]["generated_text"]
    assert text.startswith("the ")
    assert len(text) == 4 + 12


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        (dict(ngrams={3: 7}, position="rotary"), "n-gram tables.*\n.*--model.ngrams null"),
        (dict(norm="plain"), "learned positions and a norm.*\n.*--model.position rotary"),
        (dict(n_embd=16), "head's bias.*\n.*--model.bias false, or --model.n_embd of 38"),
    ],
    ids=["tables", "norm on embeddings", "few channels"],
)
def test_unsupported_networks_are_refused(tmp_path, switches, reason):
    with pytest.raises(UserError, match=reason):
        export(generator_of(**switches), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    assert not os.listdir(tmp_path)


def test_an_unknown_setting_is_refused_unless_it_has_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "REPRESENTABLE", huggingface.REPRESENTABLE - {"activation"})
    export(generator_of(), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    with pytest.raises(UserError, match="activation gelu"):
        export(generator_of(activation="gelu"), EMPTY_CHECKPOINT, tmp_path / "other", "float16")


# ---- the model card ----


def test_the_model_card_describes_training_and_loss(trained, command, tmp_path):
    best = trained / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
    flags = ["--to=huggingface", f"--ckpt_path={best}"]
    assert command(tmp_path, "export", *flags, "--output=sub/folder").status == 1  # few channels
    assert not os.listdir(tmp_path)
    checkpoint = torch.load(best, weights_only=True)
    generator, ours = generator_of(), checkpoint["chargpt"]
    export(generator, checkpoint, tmp_path / "a", "float16")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"**{ours['val_loss']:.4f}** nats" in card
    assert "text.txt" in card
    assert "n_embd: 8" in card
    assert str(trained) not in card  # paths are private
    for change in ({"val_loss": None}, {"trainer": {"limit_val_batches": 1}}):
        export(
            generator, checkpoint | {"chargpt": ours | change}, tmp_path / str(change), "float16"
        )
        card = (tmp_path / str(change) / "README.md").read_text(encoding="utf-8")
        assert "not validated" in card


# ---- atomicity ----


def test_existing_files_and_nonempty_folders_are_not_touched(trained, command, tmp_path):
    generator = generator_of()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name}.* folder"):
            export(generator, EMPTY_CHECKPOINT, tmp_path / name, "float16")
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    export(generator, EMPTY_CHECKPOINT, tmp_path / "empty", "float16")
    assert set(os.listdir(tmp_path / "empty")) == FILES
    assert set(os.listdir(tmp_path)) == {"full", "file", "empty"}
    with pytest.raises(OSError):
        export(generator, EMPTY_CHECKPOINT, tmp_path / "file" / "folder", "float16")


def test_a_failed_export_leaves_no_files(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", no_space)
    with pytest.raises(OSError, match="No space"):
        export(generator_of(), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    assert not os.listdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder"):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_json_files_contain_unescaped_characters(tmp_path):
    export(generator_of(), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    text = (tmp_path / "folder" / "tokenizer.json").read_text(encoding="utf-8")
    assert "字" in text
    assert list(json.loads(text)["model"]["vocab"]) == list(CHARACTERS)
