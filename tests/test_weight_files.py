"""Weight files that are refused: damaged ones, and those of another kind or format."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hosts import tiny_vggt
from mutations import File, cost, mutations
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pacevggt_patch import PaceWeights, WeightsError, accelerate
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method.block_deltas import BlockDeltas
from pacevggt_patch.method.scoring import TokenScorer
from pacevggt_patch.weights.pace import FORMAT, KIND
from pacevggt_patch.weights.tensorfile import (
    DIGEST,
    LARGEST_FILE,
    LONGEST_HEADER,
    digest,
    in_8_bits,
    read_metadata,
    read_tensors,
    write,
)

MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return tiny_vggt()


@pytest.fixture(params=["global", "pre-aa"])
def file(model, request, tmp_path):
    path = tmp_path / "pace.safetensors"
    PaceWeights.new(model, mode=request.param).save(path)
    return path


@pytest.fixture
def heads(model, tmp_path):
    """A file of heads only."""
    path = tmp_path / "heads.safetensors"
    PaceWeights.of_heads(find_host(model), ((1, 0),), {"clips": "one"}).save(path)
    return path


def rewrite(path, *, metadata=(), drop=(), tensors=()):
    """Change a weight file, digest and all: metadata and tensors are merged into what it holds."""
    with safe_open(path, "pt") as opened:
        old = opened.metadata()
    new = {**old, **{name: json.dumps(value) for name, value in dict(metadata).items()}}
    for name in drop:
        del new[name]
    content = {**load_file(path), **dict(tensors)}
    new[DIGEST] = json.dumps(digest(new, content))
    save_file(content, path, new)


def modules(path, **changes):
    """The sizes of a file's modules, some of them changed."""
    sizes = read_metadata(path, KIND, FORMAT)["modules"]
    return {"modules": {name: {**size, **changes.get(name, {})} for name, size in sizes.items()}}


def refused(path, *words):
    with pytest.raises(WeightsError) as caught:
        PaceWeights.load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def cheaply_refused(path, *words):
    """As `refused`, in two seconds and in memory of at most twice the file and a little."""
    seconds, memory = cost(lambda: refused(path, *words))
    assert seconds < 2 and memory < 2 * path.stat().st_size + 16 * MIB


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "link.safetensors").symlink_to("none.safetensors")
    refused(tmp_path / "link.safetensors", "does not exist")


def test_a_home_that_does_not_exist():
    with pytest.raises(WeightsError, match="~nosuchuser/pace.safetensors"):
        PaceWeights.load("~nosuchuser/pace.safetensors")


def test_pipes_and_devices_are_not_opened(tmp_path):
    path = tmp_path / "pace.safetensors"
    os.mkfifo(path)
    refused(path, "no plain file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, "no plain file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(file):
    file.chmod(0)
    refused(file, "can't be read")


def test_mutations_are_refused(model, tmp_path):
    """Every one by a WeightsError of one line that names the file, in two seconds and little memory."""
    path = tmp_path / "pace.safetensors"
    shapes = {"global_blocks.0.attn.proj.weight": (32, 32), "global_blocks.0.attn.proj.bias": (32,)}
    whole = PaceWeights.new(model, mode="pre-aa", keep_ratios=(0.3,), training={"steps": 3})
    replace(whole, restoration=None, block_deltas=BlockDeltas(shapes, 2), full_heads=((1, 0),)).save(
        path, eight_bits=True
    )
    content = path.read_bytes()
    path.write_bytes(File(content).content())
    PaceWeights.load(path)  # only what is changed makes the others fail
    count = 0
    for name, mutated in mutations(content):
        path.write_bytes(mutated)
        try:
            cheaply_refused(path)
        except BaseException as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
        count += 1
    assert count > 300


def sparse(path, hidden_dim, backbone=None, columns=32):
    """A scorer's file with a matrix of zeros that takes no room on disk, right in all but its digest."""
    scorer = TokenScorer(32, 8)
    PaceWeights.new(tiny_vggt()).save(path)
    file = File(path.read_bytes())
    sizes = {"scorer": {"hidden_dim": hidden_dim, "distinctness_weight": 0.5}}
    file.metadata["modules"] = json.dumps(sizes)
    file.metadata["backbone"] = json.dumps({**json.loads(file.metadata["backbone"]), **(backbone or {})})
    shapes = {f"scorer.{name}": list(tensor.shape) for name, tensor in scorer.state_dict().items()}
    shapes |= {"scorer.hidden.bias": [hidden_dim], "scorer.out.weight": [1, hidden_dim]}
    shapes["scorer.hidden.weight"] = [hidden_dim, columns]
    header, position = {"__metadata__": file.metadata}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + position)


def test_a_large_file_is_read_only_if_its_header_fits(tmp_path):
    path = tmp_path / "pace.safetensors"
    sparse(path, 2**20, columns=31)
    assert path.stat().st_size > 100 * MIB
    seconds, memory = cost(
        lambda: refused(path, "scorer.hidden.weight is [1048576, 31] instead of [1048576, 32]")
    )
    assert seconds < 2 and memory < 16 * MIB
    sparse(path, 2**20)
    cheaply_refused(path, "digest")


def test_a_large_file_of_another_model_is_not_read(model, tmp_path):
    path = tmp_path / "pace.safetensors"
    sparse(path, 2**20, {"depth": 99})

    def accelerated():
        with pytest.raises(WeightsError, match=r"99\+99 blocks"):
            accelerate(model, weights=path)

    seconds, memory = cost(accelerated)
    assert seconds < 2 and memory < 16 * MIB


@pytest.mark.parametrize("length", [LONGEST_HEADER + 1, 2**29, 2**60])
def test_a_long_header_is_not_read(tmp_path, length):
    """Ten million names of tensors would be more than half a gigabyte."""
    path = tmp_path / "pace.safetensors"
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(min(length, 2**29) + 8)
    seconds, memory = cost(lambda: refused(path, "not a safetensors file"))
    assert seconds < 2 and memory < 16 * MIB


def test_what_is_larger_than_any_weight_file(tmp_path):
    path = tmp_path / "pace.safetensors"
    with open(path, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    refused(path, "larger")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95" + b"\x00" * 100, b"\xff" * 4096])
def test_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "pace.safetensors"
    path.write_bytes(content)
    refused(path, "not a safetensors file")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file, "damaged")


def test_any_flipped_bit_of_a_small_file_is_found(heads):
    """Every bit: of the length, of tensor table and metadata with the name of the digest, of the digest itself."""
    whole = heads.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            heads.write_bytes(content)
            with pytest.raises(WeightsError):
                PaceWeights.load(heads)
    heads.write_bytes(whole)
    PaceWeights.load(heads)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_any_flipped_bit_of_a_file_with_tensors_is_found(model, tmp_path, eight_bits):
    """Some bits of each part, drawn at random: the whole file would take minutes."""
    path = tmp_path / "pace.safetensors"
    PaceWeights.new(model, mode="pre-aa").save(path, rank=1, eight_bits=eight_bits)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for first, last in ((0, 8), (8, header), (header, len(whole))):
        for position in torch.randint(first, last, (40,), generator=generator).tolist():
            content = bytearray(whole)
            content[position] ^= 1 << int(torch.randint(8, (), generator=generator))
            path.write_bytes(content)
            with pytest.raises(WeightsError):
                PaceWeights.load(path)


def test_a_file_without_its_digest_is_refused(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata[DIGEST]
    save_file(load_file(file), file, metadata)
    refused(file, "damaged")


def test_two_tensors_that_changed_places_are_found(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    one, other = "scorer.norm.weight", "scorer.norm.bias"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file, metadata)
    refused(file, "digest")


def test_without_metadata(file):
    save_file(load_file(file), file)
    refused(file, "does not hold pace weights")
    save_file(load_file(file), file, {"kind": "pace weights", "format": "6"})  # that is no JSON
    refused(file, "does not hold pace weights")


def test_files_of_another_kind_say_what_they_hold(tmp_path):
    from pacevggt_patch.weights.bundled import bundled_files

    refused(bundled_files("vggt-mini.safetensors")[0], "does not hold pace weights", "VGGT-mini checkpoint")


@pytest.mark.parametrize("version", [FORMAT + 1, 99])
def test_newer_formats_ask_for_an_upgrade(file, version):
    rewrite(file, metadata={"format": version})
    refused(file, f"format {version}", "newer checkout")


@pytest.mark.parametrize("version", range(FORMAT))
def test_older_formats_are_named(file, version):
    rewrite(file, metadata={"format": version})
    refused(file, f"format {version}", "anew")


@pytest.mark.parametrize("version", [None, "6", 6.0, True])
def test_a_format_that_is_no_number(file, version):
    rewrite(file, metadata={"format": version})
    refused(file, "does not hold pace weights")


@pytest.mark.parametrize(
    "name",
    [
        "backbone",
        "modules",
        "mode",
        "full_heads",
        "fingerprints",
        "keep_ratios",
        "training",
        "library_version",
    ],
)
def test_a_missing_field_is_named(file, name):
    rewrite(file, drop=[name])
    refused(file, "damaged metadata", name)


@pytest.mark.parametrize(
    "metadata",
    [
        {"backbone": 3},
        {"backbone": {"embed_dim": 32, "cached_layers": [0]}},
        {"mode": "dense"},
        {"mode": None},
        {"modules": [1]},
        {"modules": {"scorer": {}}},
        {"modules": {"tracker": {"hidden_dim": 3}}},
        {"keep_ratios": ["most"]},
        {"keep_ratios": None},
        {"fingerprints": [1]},
        {"training": 7},
    ]
    + [
        {"full_heads": value}
        for value in (None, [1], [["a", 0]], [[1.0, 0]], [[True, 0]], [[-1, 0]], [[1, 0]] * 2)
    ],
)
def test_a_damaged_field(file, metadata):
    rewrite(file, metadata=metadata)
    refused(file, "damaged metadata")


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("scorer", {"hidden_dim": "8"}),
        ("scorer", {"hidden_dim": -8}),
        ("scorer", {"distinctness_weight": 2}),
        ("scorer", {"distinctness_weight": "much"}),
        ("scorer", {"distinctness_weight": None}),
        ("block_deltas", {"rank": "a"}),
        ("block_deltas", {"rank": -1}),
        ("block_deltas", {"full_strength": 0}),
        ("block_deltas", {"full_strength": 2}),
        ("block_deltas", {"full_strength": None}),
        ("block_deltas", {"full_strength": "much"}),
        ("block_deltas", {"shapes": [1]}),
        ("block_deltas", {"shapes": {"global_blocks.0.attn.proj.weight": ["a", "b"]}}),
    ],
)
def test_sizes_out_of_range(file, module, changes):
    rewrite(file, metadata=modules(file, **{module: changes}))
    refused(file, "damaged metadata")


def test_tensors_that_do_not_fit_are_named(file):
    tensors = load_file(file)
    bias = tensors.pop("scorer.out.bias")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    rewrite(file, tensors={"extra": bias, "scorer.out.weight": torch.zeros(1, 9)})
    refused(
        file,
        "scorer.out.bias is missing",
        "extra is unknown",
        "scorer.out.weight is [1, 9] instead of [1, 8]",
    )


def test_many_wrong_tensors_are_counted(file):
    rewrite(file, metadata=modules(file, scorer={"hidden_dim": 9}, block_deltas={"rank": 17}))
    refused(file, "scorer.hidden.weight is [8, 32] instead of [9, 32]", "more")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_named(file, value):
    rewrite(file, tensors={"scorer.out.bias": torch.tensor([value])})
    refused(file, "scorer.out.bias")


def test_scales_that_belong_to_no_tensor(file):
    for name in ("nothing.row_scale", "scorer.out.bias.row_scale"):
        rewrite(file, tensors={name: torch.ones(7)})
        refused(file, name)
        rewrite_without(file, name)


def rewrite_without(file, name):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, metadata)


@pytest.mark.parametrize(
    ("module", "name"),
    [("scorer", "hidden_dim"), ("block_deltas", "rank"), ("block_deltas", "full_strength")],
)
@pytest.mark.parametrize("value", [10**9, 2**40, 10**400, -1, True, None, "8", []])
def test_sizes_that_can_not_be_are_named(file, module, name, value):
    rewrite(file, metadata=modules(file, **{module: {name: value}}))
    cheaply_refused(file, f"modules.{module}.{name}")


def test_weights_of_another_checkpoint_are_refused_from_a_path(file):
    with pytest.raises(WeightsError, match="another checkpoint") as caught:
        accelerate(tiny_vggt(seed=3), weights=file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back_as_float32(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 3, generator=generator).to(dtype),
        "row": torch.randn(1, 4, generator=generator).to(dtype),
        "kernel": torch.randn(4, 2, 3, 3, generator=generator).to(dtype),
        "vector": torch.randn(6, generator=generator).to(dtype),
        "number": torch.tensor(2.5, dtype=dtype),
        "zeros": torch.zeros(3, 4, dtype=dtype),
    }
    path = tmp_path / "tensors.safetensors"
    write(path, tensors, "tensors", 1, {})
    found = read_tensors(path, "tensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    write(path, in_8_bits(tensors), "tensors", 1, {})
    found = read_tensors(path, "tensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.float()
        largest = (
            wanted.abs()
            if wanted.ndim < 2
            else wanted.abs().flatten(1).amax(1).view(-1, *[1] * (wanted.ndim - 1))
        )
        assert ((found[name] - wanted).abs() <= largest / 200).all(), name


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64]
)
def test_dtypes_that_are_not_written_are_refused_in_every_weight_file(tmp_path, dtype):
    path = tmp_path / "tensors.safetensors"
    try:
        save_file({"matrix": torch.ones(5, 3).to(dtype)}, path)
    except KeyError:
        pytest.skip("this safetensors does not write it")
    with pytest.raises(WeightsError, match="matrix"):
        read_tensors(path, "tensors")


def test_tensors_that_are_wanted_are_compared_with_the_header(tmp_path):
    path = tmp_path / "tensors.safetensors"
    write(path, in_8_bits({"matrix": torch.ones(5, 3)}), "tensors", 1, {})
    wanted = {"matrix": torch.empty(5, 3, device="meta")}
    assert read_tensors(path, "tensors", wanted)["matrix"].shape == (5, 3)
    with pytest.raises(WeightsError, match=r"\[5, 3\] instead of \[5, 4\]"):
        read_tensors(path, "tensors", {"matrix": torch.empty(5, 4, device="meta")})


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "tensors.safetensors"
    deep = []
    for _ in range(60):
        deep = [deep]
    for fields in ({"note": "x" * LONGEST_HEADER}, {"note": deep}):
        with pytest.raises(WeightsError, match=str(path)):
            write(path, {}, "tensors", 1, fields)
    assert not path.exists()
