"""Export to Hugging Face, checked with the real transformers and tokenizers libraries."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch

import chargpt
from chargpt.export import gpt2_neox, huggingface
from chargpt.export.huggingface import atomic_folder, export
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.model.config import NORMS
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
PACKAGE = Path(chargpt.__file__).parent
CODE = {file.name for file in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}
CODE |= {"configuration_chargpt.py", "modeling_chargpt.py"}
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="tokenizers are not installed")
    library = pytest.importorskip("transformers", reason="transformers are not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        # Where it copies code to; the environment variable is read when Lightning is imported.
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(library.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [*sys.path])
        yield library


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
    """Compare logits over full contexts, and greedy text of up to 100 characters."""
    T, V = generator.gpt.config.block_size, len(generator.vocabulary)
    ids = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(hf_model(ids).logits, generator.gpt(ids), rtol=0, atol=1e-4)
    n = min(T, 100) - len(prompt)
    output = hf_model.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=n
    )
    expected = generator.complete(prompt, max_new_chars=n, temperature=0)
    assert tokenizer.decode(output[0]) == expected


def load(transformers, folder: Path):
    """The model, with permission to run code only if the folder has some, and the tokenizer."""
    trust = (folder / "gpt.py").exists()
    hf_model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust
    )
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    return hf_model.eval(), tokenizer


@pytest.mark.parametrize("config", ["base", "laptop", "cpu", "debug"])
def test_an_exported_trained_network_gives_the_same_logits_and_text(
    transformers, real_text, command, tmp_path, monkeypatch, config
):
    if config != "debug":
        real_text = real_text[:100_000]  # the whole takes a second to encode and to tokenize
    (tmp_path / "text.txt").write_bytes(real_text.encode())
    result = command(
        tmp_path,
        "fit",
        f"--config={CONFIGS / config}.yaml",
        "--data.corpus=text.txt",
        f"--data.val_fraction={1000 / len(real_text)}",
        "--data.batch_size=2",
        "--model.n_layer=2",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=2",
        "--trainer.accelerator=cpu",
    )
    assert result.status == 0, result.err
    result = command(tmp_path, "export", "--to=huggingface", "--output=folder")
    assert (result.status, result.out) == (0, ""), result.err
    assert ("with its own code" in result.err) == (config in ("cpu", "debug"))
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


OWN_CODE = {
    "n-grams, rotary": dict(position="rotary", ngrams={2: 11, 4: 37}, norm="plain", bias=False),
    "n-grams, learned": dict(ngrams={3: 37}, qkv_bias=True, activation="gelu"),
    "learned positions and a norm on the embeddings": dict(norm="plain"),
    "a head bias with fewer channels than characters": dict(n_embd=16),
}


@pytest.mark.parametrize("switches", (SWITCHES | OWN_CODE).values(), ids=SWITCHES | OWN_CODE)
def test_every_setting_gives_the_same_logits_and_text(transformers, tmp_path, switches):
    generator = generator_of(**switches)
    folder = tmp_path / "new" / "folder"
    own_code = "with its own code" in export(generator, EMPTY_CHECKPOINT, folder, "float16")
    assert own_code == (switches in OWN_CODE.values())
    assert {path.name for path in folder.iterdir()} == (FILES | CODE if own_code else FILES)
    assert os.listdir(tmp_path / "new") == ["folder"]
    hf_model, tokenizer = load(transformers, folder)
    assert_same(generator, hf_model, tokenizer, prompt="the ")
    assert hf_model.config.bos_token_id is hf_model.config.eos_token_id is None


# ---- folders with code of their own ----


@pytest.fixture(scope="module", params=["n-grams, rotary", "n-grams, learned"])
def exported(transformers, tmp_path_factory, request):
    """A network that neither GPT-2 nor GPT-NeoX can represent, its folder, and what that loads."""
    generator = generator_of(**OWN_CODE[request.param])
    folder = tmp_path_factory.mktemp("exported") / "folder"
    export(generator, EMPTY_CHECKPOINT, folder, "float16")
    return generator, folder, *load(transformers, folder)


def test_the_code_is_that_of_the_model_unchanged(transformers, exported):
    get_relative_imports = transformers.dynamic_module_utils.get_relative_imports
    folder = exported[1]
    for file in (PACKAGE / "model").glob("[!_]*.py"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert "trust_remote_code=True" in (folder / "README.md").read_text(encoding="utf-8")
    # Transformers before 5.1 copy only the files that this one imports.
    imported = get_relative_imports(folder / "modeling_chargpt.py")
    assert {f"{name}.py" for name in imported} == CODE - {"modeling_chargpt.py"}


def test_code_is_not_run_without_permission(transformers, exported):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(exported, side):
    """Logits of a padded batch are those of each text alone, in one pass and from a cache."""
    generator, _, hf_model, tokenizer = exported
    texts = ["the ", "a", "hello there", "xy"]
    tokenizer.pad_token, tokenizer.padding_side = "z", side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = hf_model(**batch).logits
        for row, text in enumerate(texts):
            expected = generator.gpt(torch.tensor([generator.encode(text)]))[0]
            actual = logits[row][batch["attention_mask"][row] == 1]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["textbook", "rotary", "n-grams, rotary", "n-grams, learned"])
def test_a_left_padded_batch_writes_the_texts_of_single_prompts(transformers, tmp_path, name):
    generator = generator_of(**(SWITCHES | OWN_CODE)[name])
    export(generator, EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    hf_model, tokenizer = load(transformers, tmp_path / "folder")
    tokenizer.pad_token, tokenizer.padding_side = "z", "left"
    texts = ["the ", "a", "hello there", "xy"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = [generator.complete(text, max_new_chars=12, temperature=0) for text in texts]
    for use_cache in (True, False):
        settings = dict(do_sample=False, max_new_tokens=12, use_cache=use_cache)
        output = hf_model.generate(**batch, **settings)
        texts_with_padding = map(tokenizer.decode, output)
        assert [t[-len(e) :] for t, e in zip(texts_with_padding, expected)] == expected


def test_a_cache_of_any_chunks_gives_the_same_logits(transformers, exported):
    generator, _, hf_model, _ = exported
    ids = torch.randint(len(CHARACTERS), (2, 24), generator=torch.Generator().manual_seed(5))
    for cache in (None, transformers.DynamicCache()):
        logits = []
        with torch.no_grad():
            for chunk in ids.split((5, 1, 1, 9, 8), dim=1):
                result = hf_model(chunk, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                logits.append(result.logits)
            torch.testing.assert_close(torch.cat(logits, 1), generator.gpt(ids), rtol=0, atol=1e-4)
    assert hf_model(ids).past_key_values is None
    assert hf_model(ids, logits_to_keep=1).logits.shape[1] == 1
    with pytest.raises(ValueError, match="25 characters, but the network sees at most 24"):
        hf_model(ids[:, :1], past_key_values=cache)


def test_beam_search_reorders_the_cache(exported):
    _, _, hf_model, tokenizer = exported
    settings = dict(do_sample=False, num_beams=4, max_new_tokens=12)
    prompt = tokenizer("the ", return_tensors="pt")
    with_cache = hf_model.generate(**prompt, **settings)
    without = hf_model.generate(**prompt, **settings, use_cache=False)
    assert with_cache.tolist() == without.tolist()


def test_labels_give_the_cross_entropy_and_gradients(exported):
    generator, _, hf_model, _ = exported
    ids = torch.randint(len(CHARACTERS), (2, 24), generator=torch.Generator().manual_seed(6))
    labels = ids.clone()
    labels[0, :9] = -100
    logits, targets = generator.gpt(ids)[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    result = hf_model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-5)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in hf_model.parameters())
    hf_model.zero_grad()
    assert isinstance(hf_model(ids, return_dict=False), tuple)


def test_save_pretrained_writes_a_folder_that_loads_equally(transformers, exported, tmp_path):
    generator, folder, hf_model, tokenizer = exported
    hf_model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} >= CODE
    again, _ = load(transformers, tmp_path / "again")
    assert all(map(torch.equal, again.state_dict().values(), hf_model.state_dict().values()))
    assert_same(generator, again, tokenizer, prompt="the ")


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


@pytest.mark.parametrize("switches", [{}, dict(position="rotary"), dict(ngrams={3: 37})])
def test_a_pipeline_generates_with_default_settings(transformers, tmp_path, switches):
    export(generator_of(**switches), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    trust = "ngrams" in switches
    pipeline = transformers.pipeline(
        "text-generation", str(tmp_path / "folder"), trust_remote_code=trust
    )
    text = pipeline("the ")[0]["generated_text"]
    assert text.startswith("the ")
    assert len(text) == 4 + 12


# ---- wrong folders are not written ----

RMS_NORM = """
import sys, torch, chargpt
from pathlib import Path
sys.modules["transformers"] = None  # the test loads the folder
from chargpt.export.huggingface import export
from chargpt.model import GPT, GPTConfig

gpt = GPT(GPTConfig(block_size=12, n_embd=16, n_head=2, n_layer=2, norm="rms", activation="silu"), 11).eval()
for parameter in gpt.parameters():
    parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
generator = chargpt.TextGenerator(gpt, chargpt.Vocabulary("abcdefghijk"))
empty = {"hyper_parameters": {}, "datamodule_hyper_parameters": {}, "global_step": 0, "chargpt": {}}
assert "with its own code" in export(generator, empty, Path("rms"), "")
ids = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(2))
torch.save((ids, gpt(ids).detach()), "logits.pt")
"""


def test_a_norm_and_an_activation_added_to_the_model_are_exported(transformers, tmp_path):
    """Entries in a copy of the package; the export has no line for them."""
    copy = tmp_path / "copy" / "chargpt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "model" / "config.py").read_text(encoding="utf-8")
    for choices, entry in (("NORMS", '"rms": nn.RMSNorm'), ("ACTIVATIONS", '"silu": F.silu')):
        start = source.index("= {\n", source.index(f"\n{choices}: ")) + 4
        source = f"{source[:start]}    {entry},\n{source[start:]}"
    (copy / "model" / "config.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RMS_NORM], cwd=tmp_path, env=environment, check=True)
    ids, expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    hf_model, _ = load(transformers, tmp_path / "rms")
    with torch.no_grad():
        torch.testing.assert_close(hf_model(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("rms", "norm is 'rms'; it must be one of layer, plain"), ("layer", "different logits|bias")],
    ids=["added", "replaced"],
)
def test_a_norm_that_only_this_program_knows_is_refused(
    tmp_path, monkeypatch, name, reason, installed
):
    if not installed:
        monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(NORMS, name, torch.nn.RMSNorm)
    norm = GPTConfig.__dataclass_fields__["norm"]
    monkeypatch.setattr(norm, "type", Literal["layer", "plain", "rms"])
    with pytest.raises(UserError, match=f"({reason})(.|\n)*have to be moved there"):
        export(generator_of(norm=name), EMPTY_CHECKPOINT, tmp_path / "folder", "float16")
    assert not os.listdir(tmp_path)


def test_a_wrong_weight_is_found_by_loading_the_folder(transformers, tmp_path, monkeypatch):
    rename = gpt2_neox.rename

    def wrong(weights, modules):
        return {name: weight.flip(0) for name, weight in rename(weights, modules).items()}

    monkeypatch.setattr(gpt2_neox, "rename", wrong)
    with pytest.raises(UserError, match="would compute different logits"):
        export(generator_of(), EMPTY_CHECKPOINT, tmp_path / "new" / "folder", "float16")
    assert not os.listdir(tmp_path)


def test_a_folder_is_the_same_without_transformers(tmp_path, monkeypatch):
    for generator in (generator_of(), generator_of(ngrams={3: 37})):
        export(generator, EMPTY_CHECKPOINT, tmp_path / "with", "float16")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            with warnings.catch_warnings(record=True) as caught:
                export(generator, EMPTY_CHECKPOINT, tmp_path / "without", "float16")
        own_code = bool(generator.gpt.config.ngrams)  # compared without Transformers too
        assert any("was not loaded" in str(entry.message) for entry in caught) != own_code
        names = {path.name for path in (tmp_path / "with").iterdir()}
        assert names == {path.name for path in (tmp_path / "without").iterdir()}
        for name in names:
            first, second = ((tmp_path / f / name).read_bytes() for f in ("with", "without"))
            assert first == second
        shutil.rmtree(tmp_path / "with")
        shutil.rmtree(tmp_path / "without")


# ---- the model card ----


def test_the_model_card_describes_training_and_loss(trained, command, tmp_path):
    best = trained / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
    flags = ["--to=huggingface", f"--ckpt_path={best}"]
    result = command(tmp_path, "export", *flags, "--output=sub/folder")
    assert (result.status, "with its own code" in result.err) == (0, True)  # few channels
    checkpoint = torch.load(best, weights_only=True)
    generator, ours = generator_of(), checkpoint["chargpt"]
    export(generator, checkpoint, tmp_path / "a", "float16")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"**{ours['val_loss']:.4f}** nats" in card
    assert "text.txt" in card
    assert "n_embd: 8" in card
    assert str(trained) not in card  # paths are private
    assert "the part of the text after the training part" in card
    separate = {"val_corpus": "/secret/val.txt"}
    named = checkpoint | {
        "datamodule_hyper_parameters": checkpoint["datamodule_hyper_parameters"] | separate
    }
    export(generator, named, tmp_path / "b", "float16")
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert "split, a separate text:" in card and "secret" not in card
    for change in ({"val_loss": None}, {"trainer": {"limit_val_batches": 1}}):
        export(
            generator, checkpoint | {"chargpt": ours | change}, tmp_path / str(change), "float16"
        )
        card = (tmp_path / str(change) / "README.md").read_text(encoding="utf-8")
        assert "no loss of these weights" in card


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
