"""Programs compiled for TPUs and GPUs that are not here, and what `plan` reads in them."""

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import ffhq128
from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.batches import batch_reader
from facevae_jax.data.feed import FeedSpec
from facevae_jax.data.plan import BatchPlan
from facevae_jax.planning import programs
from facevae_jax.planning.plans import Plan, _flops, advice, plan
from facevae_jax.planning.topologies import GIB, TPUS, Topology, topology_of
from facevae_jax.training.feeds import feed_spec
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from tests.conftest import assert_one_line_error, change, run_module

HEAD = 4  # side of the largest kernel, that of a head that doubles by nearest neighbors before a convolution of 3
PROGRAM = """
HloModule jit_train_steps, is_scheduled=true

%body.1 (p: (f32[8], u8[4,128])) -> (f32[8], u8[4,128]) {
  %p = (f32[8]{0}, u8[4,128]{1,0}) parameter(0)
  %g.1 = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=0
  %f.1 = f32[2,8]{1,0:T(8,128)} fusion(%g.1), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"120"}
  %ar.1 = ((f32[2,8]{1,0}, f32[8]{0}), (f32[2,8]{1,0}, f32[8]{0})) all-reduce-start(%f.1, %g.1), to_apply=%add
  %ar.2 = (f32[2,8]{1,0}, f32[8]{0}) all-reduce-done(%ar.1)
  %ag.1 = (f32[8]{0}, f32[32]{0}) all-gather-start(%g.1), dimensions={0}
  ROOT %t.1 = (f32[8]{0}, u8[4,128]{1,0}) tuple(%g.1, %g.1)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %copy.1 = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"7"}
  %w = (f32[8]{0}, u8[4,128]{1,0}) while(%copy.1), condition=%cond, body=%body.1
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=0
}
"""


def needs(topology: str):
    """A topology, or a skip with the reason."""
    module = "jax_cuda13_plugin" if "h100" in topology else "libtpu"
    return pytest.param(
        topology,
        marks=[
            pytest.mark.plan,
            pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed"),
        ],
    )


BLOCKS = """
HloModule jit_train_steps, is_scheduled=true

%below.1 (p: (s32[])) -> pred[] {
  %p.1 = (s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %five.1 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[] compare(%i.1, %five.1), direction=LT
}

%block.1 (p: (s32[])) -> (s32[]) {
  %f.1 = f32[8]{0} fusion(%stack.1), kind=kLoop, backend_config={"estimated_cycles":"100"}
}

%step.1 (p: (s32[])) -> (s32[]) {
  %w.1 = (s32[]) while(%p), condition=%below.1, body=%block.1
  %w.2 = (s32[]) while(%p), condition=%other, body=%block.1, backend_config={"known_trip_count":{"n":"3"}}
  %f.2 = f32[8]{0} fusion(), kind=kLoop, backend_config={"estimated_cycles":"1"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %stack.1 = f32[5,16]{1,0} parameter(0)
  %w = (s32[]) while(%a), condition=%cond, body=%step.1
}
"""


def test_a_loop_over_blocks_counts_as_often_as_it_turns():
    program = programs.parse(BLOCKS)
    assert programs.cycles(program) == (801, 0)
    assert programs.launches(program) == 9
    one, all_rows = 4 * (16 + 8), 4 * (5 * 16 + 8)  # read and written; a turn of the first loop reads one of five rows
    assert programs.traffic(program) == 5 * one + 3 * all_rows + 4 * 8


def test_operations_of_a_loop_are_counted_as_often_as_it_turns():
    """XLA counts a loop's body once."""

    def function(x, weights):
        return jax.lax.scan(lambda y, w: (jnp.sin(jax.jit(jnp.matmul)(y, w)), None), x, weights)[0]

    x, weights = jnp.ones((16, 16)), jnp.ones((7, 16, 16))
    found = _flops(jax.make_jaxpr(jax.grad(lambda x, weights: jnp.sum(function(x, weights))))(x, weights))
    assert found == pytest.approx(7 * 4 * 16**3, rel=0.1)  # products of the values and of the gradient


@pytest.mark.parametrize(
    ("batch_size", "temporary_gib", "remedy"),
    [(64, 1.5, "batch_size=512,"), (64, 3.0, "no memory for more"), (800, 11.0, "batch_size=512,")],
)
def test_batches_for_all_lanes_of_a_tpu_are_advised_where_they_fit(batch_size, temporary_gib, remedy):
    """On 4 devices of 15.75 GiB: 128 images for 16 take 8 times the temporaries; 256 for 200, 1.28 times."""
    chip = TPUS["v5e"].chip
    values: dict = {field.name: field.type() for field in dataclasses.fields(Plan)}  # 0, "" and so on
    values |= {"devices": 4, "batch_size": batch_size, "memory_bytes": int(chip.memory), "argument_bytes": 3 * GIB}
    found = Plan(**values | {"temporary_bytes": int(temporary_gib * GIB)})
    config = RunConfig.from_config_dict({"train": {"batch_size": batch_size}})
    given = advice(config, Topology("v5e-4", "tpu", chip, (), 1), found)
    assert remedy in next(line for line in given if "lanes" in line)


V5E, H100 = needs("v5e-4"), needs("8xh100")


def test_what_a_device_sends_is_what_goes_in_and_not_what_comes_out():
    """Of asynchronous exchanges the shape holds operands and results: 2x8 + 8 floats are reduced, and 8 gathered."""
    program = programs.parse(PROGRAM)
    assert programs.exchanges(program) == {"all-gather": (1, 32), "all-reduce": (1, 96)}
    assert programs.cycles(program) == (120, 7)
    assert programs.launches(program) == 3
    # Of three instructions; g.1 is in a TPU's own memory.
    assert programs.traffic(program) == 64 + (64 + 2 * (64 + 32)) + (32 + 128)
    assert programs.array_bytes("(f32[2,8]{1,0:T(8,128)}, bf16[3]{0:S(1)}, pred[])", outside=True) == 65


def test_mistakes_are_one_line():
    for given, expected in {
        ("--topology=v5e-5",): "v5e-4",
        ("--topology=8xb900",): "8xh100",
        ("--topology=v5e-4", "--config.train.batch_size=3"): "--config.train.batch_size=4",
        ("--topology=8xh100", "--config.train.accumulation=7"): "config.train.accumulation",
        (): "--topology",
    }.items():
        module = "jax_cuda13_plugin" if "8xh100" in str(given) else "libtpu"
        result = run_module("facevae_jax.plan", "--config=quickstart", *given)
        missing = given and importlib.util.find_spec(module) is None and "v5e-5" not in str(given)
        missing = missing and "b900" not in str(given) and "accumulation" not in str(given)
        assert_one_line_error(result, "pip install" if missing else expected)


def small(**sections) -> RunConfig:
    settings = {
        "data": {"resolution": 32, "flip": True},
        "model": {"filters": (8, 16, 24), "latent_dim": 5, "dropout_rate": 0.25},
        "train": {"batch_size": 64, "steps_per_dispatch": 4},
    }
    for name, values in sections.items():
        settings[name] |= values
    return RunConfig.from_config_dict(settings)


@functools.cache
def compiled(topology: str, folder) -> str:
    plan(small(), topology_of(topology), images=1000, dump=folder)
    return (folder / f"{topology}.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("topology", [V5E, H100])
def test_no_window_is_larger_than_the_kernel_and_no_activation_is_reversed(topology, folder):
    text = compiled(topology, folder)
    windows = {tuple(map(int, found.split("x"))) for found in re.findall(r"window={size=(\d+x\d+)", text)}
    on_gpu = "h100" in topology
    assert windows
    # A TPU's compiler writes a kernel's gradient as a convolution whose window is the smaller image.
    assert max(max(sizes) for sizes in windows) <= (HEAD if on_gpu else 16)
    reversed_shapes = [
        [int(size) for size in found.split(",")] for found in re.findall(r"= b?f\d+\[([\d,]+)\]\S* reverse\(", text)
    ]
    # Kernels alone, whose sides may stand anywhere in a GPU's layout; images are mirrored as uint8.
    assert all(max((sorted(sizes) if on_gpu else sizes)[:2]) <= HEAD for sizes in reversed_shapes)


@pytest.mark.parametrize("topology", [V5E, H100])
def test_dropout_is_drawn_once(topology, folder, tmp_path):
    """Not in each fusion that reads the bits: a block of threefry has 21 `xor`, and there are 5 hidden layers."""

    def drawn(text: str) -> int:
        return sum(programs.array_bytes(shape) >= 4 * 8 * 8 for shape in re.findall(r"= (\S+) xor\(", text))

    plan(small(model={"dropout_rate": 0.0}), topology_of(topology), images=1000, dump=tmp_path)
    without = (tmp_path / f"{topology}.txt").read_text()
    assert drawn(compiled(topology, folder)) - drawn(without) == 5 * 21


@pytest.mark.parametrize("topology", [V5E])
def test_a_tpus_step_has_few_passes_over_pixels(topology, folder):
    program = programs.parse(compiled(topology, folder))
    # The compiler joins exchanges: of a normalized layer's sums, both ways; of the gradients; perhaps of the loss.
    assert programs.exchanges(program)["all-reduce"][0] <= 2 * 5 + 2
    # One pass writes numbers of the pixels: the error's slopes. None is for the gradient of the last layer's bias.
    images = re.compile(r"\b(?:f32|bf16)\[16,32,32,3\]")
    written = [each for each in program.step if each.op == "fusion" and images.search(each.shape)]
    assert len(written) == 1
    assert sum("f32[16,3]" in each.shape for each in written) == 1


@pytest.mark.parametrize("topology", [V5E])
def test_ffhq128_fills_the_lanes_of_four_chips(topology, tmp_path):
    """By itself the compiler puts the last kernel's three outputs into 128 lanes. Smaller programs do not show it."""
    config = change(RunConfig.from_config_dict(ffhq128.get_config()), train={"batch_size": 512})
    found = plan(config, topology_of(topology), images=60_000, dump=tmp_path)
    assert found.images_per_second / found.devices > 60_000
    shapes = programs.parse((tmp_path / f"{topology}.txt").read_text()).shapes.values()
    kernels = [shape for shape in shapes if shape.startswith("bf16[4,4,3,32]")]
    assert kernels
    assert all("{3,2,1,0" in shape for shape in kernels)


@pytest.mark.plan
def test_adam_is_one_launch_of_a_gpu_and_products_are_of_bfloat16(folder):
    topology = "8xh100"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the compiler is not installed")
    text = compiled(topology, folder)
    setup = TrainSetup.of(small(), make_mesh(topology_of(topology).devices))
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(setup).params))
    vectors = rf"f32\[{size}\]\S*"
    # The parameters and Adam's two moments, in one fusion; and the gradients in one exchange.
    program = programs.parse(text)
    updates = [each for each in program.step if len(re.findall(vectors, each.shape)) == 3 and each.op == "fusion"]
    assert len(updates) == 1
    assert programs.launches(program) < 100
    convolutions = [each.shape for each in program.step if "__cudnn$conv" in each.attributes]
    assert {re.search(r"\w+", shape)[0] for shape in convolutions} == {"bf16"}


@pytest.mark.parametrize("topology", [V5E, H100])
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_the_split_is_not_copied(topology, resolution):
    mesh = make_mesh(topology_of(topology).devices)
    shape = (resolution, resolution, 3)
    spec = FeedSpec.of("resident", BatchPlan(0, 20_000, 64), shape, mesh, capacity=4)
    memory, _ = read_batch(spec)
    assert memory.temp_size_in_bytes < 5 * 64 * resolution**2 * 3 * 4  # some batches, and not 20,000 images


@pytest.mark.plan
@pytest.mark.parametrize(
    "topologies", [[needs("v6e-4"), needs("v6e-64")], [needs("8xh100"), needs("8x8xh100")]], ids=["TPU", "GPU"]
)
def test_a_sharded_feed_sends_a_devices_share_however_many_there_are(topologies):
    sent = []
    for each in topologies:
        (topology,) = each.values
        if importlib.util.find_spec("jax_cuda13_plugin" if "h100" in topology else "libtpu") is None:
            pytest.skip("the compiler is not installed")
        mesh = make_mesh(topology_of(topology).devices)
        plan = BatchPlan(0, 100_000, 16 * mesh.size)
        spec = FeedSpec.of("sharded", plan, (64, 64, 3), mesh, capacity=4)
        memory, text = read_batch(spec)
        program = programs.parse(text)
        sent.append({kind: size for kind, (_, size) in programs.exchanges(program).items()})
        assert memory.temp_size_in_bytes < 10 * 64 * 64 * 64 * 3
    assert sent[0] == sent[1]
    assert set(sent[0]) == {"ragged-all-to-all"}


@pytest.mark.parametrize("topology", [needs("v5e-64")])
def test_a_slice_that_cannot_exchange_streams(topology):
    config, mesh = small(train={"batch_size": 64}), make_mesh(topology_of(topology).devices)
    size = 1000 * 32 * 32 * 3
    assert feed_spec(config, 1000, mesh, budget=size)[0].kind == "resident"
    assert feed_spec(config, 1000, mesh, budget=size // 2)[0].kind == "streamed"
    with pytest.raises(UserError, match=r"config\.data\.feed=streamed"):
        feed_spec(small(data={"feed": "sharded"}), 1000, mesh, budget=size)


def read_batch(spec: FeedSpec):
    """Memory and text of a program that sums the batches of a dispatch, step by step."""

    def total(chunk):
        read = batch_reader(chunk, mesh=spec.mesh)
        start = jnp.zeros((spec.batch_images, *spec.image_shape))
        start = jax.lax.with_sharding_constraint(start, NamedSharding(spec.mesh, PartitionSpec("data")))
        return jax.lax.fori_loop(
            0, spec.capacity, lambda index, sums: sums + read(index).images.reshape(start.shape) / 255, start
        )

    program = jax.jit(total).lower(spec.abstract_chunk()).compile()
    return program.memory_analysis(), program.as_text()


@pytest.mark.parametrize("topology", [V5E, H100])
def test_a_plan_is_json_and_names_what_is_sent(topology, tmp_path):
    flags = ("--images=1000", "--json", "--config.train.batch_size=60", "--config.data.resolution=32")
    network = ("--config.model.filters=(8,16)", "--config.train.steps=100", "--config.train.steps_per_dispatch=4")
    result = run_module("facevae_jax.plan", "--config=quickstart", f"--topology={topology}", *flags, *network)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert found["peak_bytes"] < found["memory_bytes"]
    assert set(found["exchanges"]) == {"all-reduce"}
    assert found["hours"] == pytest.approx(100 * found["estimated_step_seconds"] / 3600)


@pytest.mark.parametrize("topology", [needs("1xh100"), needs("v5e-1")])
def test_what_does_not_fit_is_refused_with_a_remedy_that_was_compiled(topology, capsys):
    batch = 15 * 2**13 if "h100" in topology else 2**15  # 6% more than an H100 holds; half of it needs 6% less
    config = small(data={"resolution": 128}, train={"batch_size": batch, "steps_per_dispatch": 1})
    with pytest.raises(UserError, match=r"does not fit.*This fits: config.train.accumulation=2\."):
        plan(config, topology_of(topology), images=batch)
    first, second = re.findall(r"compiling for .* images in (\d) parts", capsys.readouterr().err)
    assert (first, second) == ("1", "2")


@pytest.mark.parametrize("topology", [needs("1xh100")])
def test_single_images_that_do_not_fit_are_computed_again(topology):
    """48 blocks at 1024x1024 and one image: there are no smaller parts."""
    network = {
        "kind": "hierarchical",
        "encoder_blocks": "1024x47,1024d1024",
        "decoder_blocks": "1x1,1024m1",
    }
    train = {"batch_size": 1, "steps_per_dispatch": 1}
    config = RunConfig.from_config_dict({"data": {"resolution": 1024}, "model": network, "train": train})
    with pytest.raises(UserError, match=r"does not fit.*This fits: config.model.rematerialize=True\."):
        plan(config, topology_of(topology), images=8)
