"""Which file a tensor is read from, and which tensor is the head: the index of a sharded directory, tied embeddings."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from dspark_kernels import checkpoint
from reference.model import Target
from tests import directories as made

save_file = pytest.importorskip("safetensors.torch").save_file
NORM = "model.norm.weight"
SHARDS = ("a.safetensors", "b.safetensors")


def sharded(directory, *, also=None, index=None):
    """A target in two shards. also: file -> tensors it holds besides its own. index: entries of the index that differ."""
    config, shapes = made.target()
    tensors = made.tensors(shapes)
    names = sorted(tensors)
    where = {name: SHARDS[name > names[len(names) // 2]] for name in names}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for file in {*SHARDS, *(also or {})}:
        own = {name: tensors[name] for name in names if where[name] == file}
        save_file(own | (also or {}).get(file, {}), directory / file, metadata={"format": "pt"})
    where = {name: file for name, file in (where | (index or {})).items() if file is not None}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory, tensors


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["a.safetensors", "model.safetensors", "z.safetensors"])
def test_the_index_decides_and_other_files_that_hold_the_tensor_are_ignored(tmp_path, other):
    """model.norm.weight is b's by the index; the other file's is all nines, before or after b in any order of files."""
    directory, tensors = sharded(tmp_path / "d", also={other: {NORM: torch.full((24,), 9.0)}})
    loaded = checkpoint.load_target(directory)
    assert torch.equal(loaded.tensors[NORM], tensors[NORM])
    assert checkpoint.stored_tensors(directory)[NORM].file == directory / "b.safetensors"


def test_the_index_decides_for_the_earlier_file_too(tmp_path):
    nines = torch.full((24,), 9.0)
    directory, _ = sharded(tmp_path / "d", also={"a.safetensors": {NORM: nines}}, index={NORM: "a.safetensors"})
    assert torch.equal(checkpoint.load_target(directory).tensors[NORM], nines)


def test_a_whole_file_beside_an_index_is_read_where_the_index_names_it(tmp_path):
    nines = torch.full((24,), 9.0)
    directory, _ = sharded(tmp_path / "d", also={"model.safetensors": {NORM: nines}}, index={NORM: "model.safetensors"})
    assert torch.equal(checkpoint.load_target(directory).tensors[NORM], nines)


def test_an_index_that_names_a_file_without_the_tensor_is_refused(tmp_path):
    directory, _ = sharded(tmp_path / "d", index={NORM: "a.safetensors"})
    for read in (checkpoint.load_target, checkpoint.check, checkpoint.stored_tensors):
        with pytest.raises(
            ValueError, match=rf"a\.safetensors: expected the tensor {NORM}, .*index\.json.*found it in b\.safetensors"
        ):
            read(directory)
    directory, _ = sharded(tmp_path / "e", index={"model.extra.weight": "a.safetensors"})
    with pytest.raises(ValueError, match=r"a\.safetensors: expected the tensor model\.extra\.weight, .* found none"):
        checkpoint.load_target(directory)


def test_a_tensor_that_the_index_leaves_out_is_not_read(tmp_path):
    directory, _ = sharded(tmp_path / "d", index={NORM: None})
    with pytest.raises(ValueError, match=rf"expected the tensor {NORM} \[24\], found none; b\.safetensors holds it, but .*index"):
        checkpoint.load_target(directory)


def test_a_surplus_tensor_of_a_shard_is_refused_though_the_index_leaves_it_out(tmp_path):
    """A gate that the index forgot is no vanilla head."""
    directory, _ = sharded(tmp_path / "d", also={"a.safetensors": {"model.gate.weight": torch.zeros(3)}})
    with pytest.raises(ValueError, match=r"a\.safetensors: expected no tensor model\.gate\.weight"):
        checkpoint.load_target(directory)


def test_a_shard_that_is_missing_is_named_though_a_whole_file_is_there(tmp_path):
    directory, tensors = sharded(tmp_path / "d", also={"model.safetensors": {}})
    save_file(tensors, directory / "model.safetensors")
    (directory / "b.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"b\.safetensors: named by .*index\.json.*model\.safetensors beside it is not read"
    ):
        checkpoint.load_target(directory)


@pytest.mark.parametrize("second, refused", [("b.safetensors", True), ("a.safetensors", False)])
def test_a_name_that_stands_twice_in_the_index(tmp_path, second, refused):
    """Python's JSON keeps the last of two entries."""
    directory, _ = sharded(tmp_path / "d", also={"a.safetensors": {NORM: torch.ones(24)}}, index={NORM: "a.safetensors"})
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{second}", '))
    if not refused:
        checkpoint.load_target(directory)
        return
    with pytest.raises(ValueError, match=rf"index\.json: expected one value of {NORM}, got 'b\.safetensors' and 'a\.safetensors'"):
        checkpoint.load_target(directory)


# --- the head ---------------------------------------------------------------------------------------------------------


def tied(directory, head, **changes):
    """A target that calls itself tied. head: what the files hold as lm_head.weight, from the embedding."""
    config, shapes = made.target(tie_word_embeddings=True, **changes)
    tensors = made.tensors(shapes)
    tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"])
    return made.write(directory, config, {name: tensor for name, tensor in tensors.items() if tensor is not None}), tensors


@pytest.mark.parametrize(
    "head", [lambda e: None, lambda e: e.clone(), lambda e: e.double().float()], ids=["no head", "the same", "a copy"]
)
def test_a_head_that_is_the_embedding_is_not_kept_twice(tmp_path, head):
    directory, tensors = tied(tmp_path / "d", head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = checkpoint.load_target(directory)
        target = Target(loaded.config, loaded.tensors)
    assert "lm_head.weight" not in loaded.tensors and loaded.config["tie_word_embeddings"] is True
    assert torch.equal(target.head, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "head",
    [lambda e: 2 * e, lambda e: torch.where(torch.arange(41)[:, None] == 40, 0 * e, e), lambda e: e.bfloat16()],
    ids=["all rows", "the last row", "rounded to bf16"],
)
def test_a_head_of_other_values_is_taken_and_said(tmp_path, head):
    directory, tensors = tied(tmp_path / "d", head)
    with pytest.warns(UserWarning, match=r"config\.json: tie_word_embeddings is true, but lm_head\.weight .* is taken as the head"):
        loaded = checkpoint.load_target(directory)
    assert torch.equal(loaded.tensors["lm_head.weight"], tensors["lm_head.weight"])
    assert loaded.config["tie_word_embeddings"] is False  # for engines that tie by the config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = Target(loaded.config, loaded.tensors)
    hidden = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(target.logits(hidden), hidden @ tensors["lm_head.weight"].float().T)
    # The reference says it too where it is given such tensors by hand, and takes the same head.
    raw = {**loaded.config, "tie_word_embeddings": True}
    with pytest.warns(UserWarning, match="lm_head.weight is not the embedding"):
        assert torch.equal(Target(raw, loaded.tensors).head, target.head)


def test_a_tied_head_of_another_shape_or_dtype_is_refused(tmp_path):
    directory, _ = tied(tmp_path / "d", lambda e: e[:40].clone())
    with pytest.raises(ValueError, match=r"expected lm_head\.weight of shape \[41, 24\], got \[40, 24\]"):
        checkpoint.load_target(directory)
    directory, _ = tied(tmp_path / "e", lambda e: e.to(torch.int8))
    with pytest.raises(ValueError, match=r"expected lm_head\.weight in BF16 or F16 or F32, got I8"):
        checkpoint.load_target(directory)


@pytest.mark.parametrize("value", ["true", 1, "false"])
def test_tie_word_embeddings_is_a_boolean(tmp_path, value):
    config, shapes = made.target(tie_word_embeddings=value)
    with pytest.raises(ValueError, match=f"expected tie_word_embeddings true or false, got {value!r}"):
        checkpoint.load_target(made.write(tmp_path / "d", config, made.tensors(shapes)))


def test_an_untied_target_without_a_head_is_refused(tmp_path):
    config, shapes = made.target(tie_word_embeddings=False)
    del shapes["lm_head.weight"]
    tensors = made.tensors(shapes)
    with pytest.raises(ValueError, match="expected the tensor lm_head.weight"):
        checkpoint.load_target(made.write(tmp_path / "d", config, tensors))
    with pytest.raises(ValueError, match="lm_head.weight: expected a tensor"):
        Target(config, tensors)


@pytest.mark.parametrize("equal", [True, False])
def test_a_drafter_that_calls_itself_tied(tmp_path, equal):
    """DeepSpec's class has two tables whatever the config says."""
    config, shapes = made.dspark(tie_word_embeddings=True)
    tensors = made.tensors(shapes)
    if equal:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    directory = made.write(tmp_path / "d", config, tensors)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = checkpoint.load_drafter(directory)
    assert len(said) == (0 if equal else 1)
    assert torch.equal(loaded.tensors["lm_head.weight"], tensors["lm_head.weight"])


def test_a_target_of_transformers_keeps_the_files_head(tmp_path):
    huggingface = pytest.importorskip("reference.huggingface")
    pytest.importorskip("transformers")
    directory, tensors = tied(tmp_path / "d", lambda e: 2 * e)
    assert torch.equal(huggingface.load(directory).head, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "also, index, message",
    [
        ({"a.safetensors": {"model.layers.2.mlp.up_proj.weight": None}}, {}, None),  # a copy, which may be read instead
        ({"z.safetensors": {NORM: torch.full((24,), 9.0)}}, {}, None),  # a file that nobody reads
        ({"a.safetensors": {NORM: torch.full((24,), 9.0)}}, {}, rf"a\.safetensors: expected no {NORM} but that of b\.safetensors"),
        (
            {"a.safetensors": {NORM: torch.full((24,), 9.0)}},
            {NORM: "a.safetensors"},
            rf"b\.safetensors: expected no {NORM} but that of a\.safetensors",
        ),
        ({}, {NORM: "a.safetensors"}, rf"a\.safetensors: expected the tensor {NORM}"),
        (
            {"model.safetensors": {NORM: torch.full((24,), 9.0)}},
            {},
            r"index\.json: expected to name model\.safetensors, .* got a\.",
        ),
    ],
    ids=["a copy", "another file", "other values before", "other values behind", "not there", "a whole file"],
)
def test_a_target_of_transformers_is_read_as_the_index_says(tmp_path, also, index, message):
    """transformers 5.10 reads every shard and keeps the last of two tensors, or model.safetensors and no index at all."""
    pytest.importorskip("transformers")
    from reference import huggingface

    tensors = made.tensors(made.target()[1])
    also = {file: {n: tensors[n] if t is None else t for n, t in held.items()} for file, held in also.items()}
    directory, tensors = sharded(tmp_path / "d", also=also, index=index)
    if message is None:
        model = huggingface.load(directory)._model
        assert torch.equal(model.model.norm.weight, tensors[NORM])
        return
    with pytest.raises(ValueError, match=message):
        huggingface.load(directory)
