"""Mode `propagate`: attention outputs kept up to date without computing them again, and the changes that spread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_hf import NeuroFlowGateConfig, NeuroFlowSiglipVisionModel, NeuroFlowStream
from neuroflow_hf.vision import propagate as neuroflow_propagate
from neuroflow_hf.vision.naive import NaiveStream
from neuroflow_hf.vision.propagate import AttentionState, attend_with_mass, exchange_keys, has_moved, is_worn_out
from tests.conftest import NUM_PATCHES, TINY_VISION, lively, play, random_video
from tests.vision.test_modes import counted, eager

HEADS, DIM, SCALE = 2, 16, 0.5

pytestmark = pytest.mark.usefixtures("no_grad")


def vectors(generator, *shape):
    return torch.randn(*shape, generator=generator)


def exact(query, key, value):
    """Attention in float64, head by head: outputs [S, Q, D], log-sum-exp [S, Q, H], largest weights [S, Q, H]."""
    query, key, value = (t.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * SCALE
    weights = scores.softmax(-1)
    output = (weights @ value).transpose(1, 2).flatten(2)
    return output, scores.logsumexp(-1).transpose(1, 2), weights.amax(-1).transpose(1, 2)


def relative_error(output, expected):
    return ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


# --- the attention state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2 * 2 * 9 * 20, 2**21])
def test_attention_with_its_mass_in_pieces(monkeypatch, at_once):
    monkeypatch.setitem(neuroflow_propagate.SCORES_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    query, key, value = vectors(generator, 2, 50, DIM), vectors(generator, 2, 9, DIM), vectors(generator, 2, 9, DIM)
    output, log_mass = attend_with_mass(query, key, value, HEADS, SCALE)
    expected, expected_mass, _ = exact(query, key, value)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_mass.double(), expected_mass, rtol=1e-5, atol=1e-6)
    state = AttentionState(output, log_mass, log_mass)
    new_key, new_value = vectors(generator, 2, 3, DIM), vectors(generator, 2, 3, DIM)
    state = exchange_keys(state, query, key[:, :3], value[:, :3], new_key, new_value, HEADS, SCALE)
    key, value = torch.cat([new_key, key[:, 3:]], dim=1), torch.cat([new_value, value[:, 3:]], dim=1)
    expected, expected_mass, _ = exact(query, key, value)
    torch.testing.assert_close(state.output.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.log_mass.double(), expected_mass, rtol=1e-5, atol=1e-6)


def follow(peakedness, step, dtype, updates=3000, patches=24, changed=3, rule=is_worn_out):
    """
    Many updates of a few keys each, those worn out computed anew: the largest error, the share of rows that were
    computed anew, and the share that had a key with over 90% of the mass.
    """
    generator = torch.Generator().manual_seed(0)
    query = (peakedness * vectors(generator, 1, patches, DIM)).to(dtype)
    key, value = (vectors(generator, 1, patches, DIM).to(dtype) for _ in range(2))
    output, log_mass = attend_with_mass(query, key, value, HEADS, SCALE)
    state, worst, anew, peaked = AttentionState(output, log_mass, log_mass), 0.0, 0, 0.0
    for update in range(updates):
        places = torch.randperm(patches, generator=generator)[:changed]
        old_key, old_value = key[:, places], value[:, places]
        new_key = math.sqrt(1 - step**2) * old_key.float() + step * vectors(generator, 1, changed, DIM)
        key[:, places], value[:, places] = new_key.to(dtype), vectors(generator, 1, changed, DIM).to(dtype)
        changes = (old_key, old_value, key[:, places], value[:, places])
        state = exchange_keys(state, query, *changes, HEADS, SCALE)
        rows = rule(state)[0]
        if rows.any():
            output, log_mass = attend_with_mass(query[:, rows], key, value, HEADS, SCALE)
            for tensor, fresh in zip(state, (output, log_mass, log_mass), strict=True):
                tensor[:, rows] = fresh
            anew += int(rows.sum())
        if update % 20 == 0 or update == updates - 1:
            expected, _, largest = exact(query, key, value)
            worst = max(worst, relative_error(state.output, expected), key=lambda error: (math.isnan(error), error))
            peaked = max(peaked, (largest > 0.9).double().mean().item())
    return worst, anew / (updates * patches), peaked


# Measured, over 3,000 updates: errors up to 4e-4; about half of these shares of rows computed anew.
@pytest.mark.parametrize(
    "peakedness, step, dtype, least_peaked, most_anew",
    [
        (1, 0.1, torch.float32, 0.0, 0.01),
        (1, 1.0, torch.float32, 0.0, 0.01),
        (8, 0.1, torch.float32, 0.5, 0.05),
        (8, 1.0, torch.float32, 0.5, 0.25),
        (64, 0.1, torch.float32, 0.9, 0.2),
        (64, 1.0, torch.float32, 0.9, 0.4),
        (64, 0.1, torch.bfloat16, 0.9, 0.2),
    ],
)
def test_thousands_of_updates_equal_full_computation(peakedness, step, dtype, least_peaked, most_anew):
    """Keys that drift or jump; rows from nearly uniform to nearly one-hot."""
    worst, anew, peaked = follow(peakedness, step, dtype)
    assert worst < 2e-3
    assert anew < most_anew
    assert peaked >= least_peaked


def test_without_computing_worn_out_rows_anew_the_error_grows_without_bound():
    worst, _, _ = follow(8, 0.1, torch.float32, rule=lambda state: torch.zeros(1, 24, dtype=torch.bool))
    assert worst > 1


def test_a_key_that_holds_nearly_all_the_mass_may_come_and_go():
    generator = torch.Generator().manual_seed(0)
    query, value = vectors(generator, 1, 4, DIM), vectors(generator, 1, 6, DIM)
    key = 0.1 * vectors(generator, 1, 6, DIM)
    output, log_mass = attend_with_mass(query, key, value, HEADS, SCALE)
    state = AttentionState(output, log_mass, log_mass)
    strong = key.clone()
    strong[:, 2] = 300 * query[:, 0]  # of row 0; its score is about e^1000 times the others'
    assert exact(query, strong, value)[2][0, 0].min() > 1 - 1e-9
    came = exchange_keys(state, query, key[:, 2:3], value[:, 2:3], strong[:, 2:3], value[:, 2:3], HEADS, SCALE)
    assert relative_error(came.output, exact(query, strong, value)[0]) < 1e-5
    assert not is_worn_out(came)[0, 0]
    went = exchange_keys(came, query, strong[:, 2:3], value[:, 2:3], key[:, 2:3], value[:, 2:3], HEADS, SCALE)
    assert all(tensor.isfinite().all() for tensor in went)
    assert is_worn_out(went)[0, 0]


def test_a_mass_that_fades_by_small_steps_is_noticed():
    """No single update takes a tenth of the mass away, all together take it by e^20, and errors with it."""
    generator = torch.Generator().manual_seed(0)
    query, value = vectors(generator, 1, 1, DIM), vectors(generator, 1, 5, DIM)
    key = 0.1 * vectors(generator, 1, 5, DIM)
    towards = query[0, 0] / query.unflatten(-1, (HEADS, -1)).square().sum(-1).amin() / SCALE
    strengths = [20 * towards * (1 - step / 100) for step in range(101)]
    key[:, 2] = strengths[0]
    output, log_mass = attend_with_mass(query, key, value, HEADS, SCALE)
    state, anew = AttentionState(output, log_mass, log_mass), 0
    for strength in strengths[1:]:
        old = key[:, 2:3].clone()
        key[:, 2] = strength
        state = exchange_keys(state, query, old, value[:, 2:3], key[:, 2:3], value[:, 2:3], HEADS, SCALE)
        if is_worn_out(state).any():
            output, log_mass = attend_with_mass(query, key, value, HEADS, SCALE)
            state, anew = AttentionState(output, log_mass, log_mass), anew + 1
        assert relative_error(state.output, exact(query, key, value)[0]) < 1e-4
    assert 5 < anew < 20


def test_how_far_a_patch_moved():
    reference = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])
    output = torch.tensor([[[3.0, 5.1], [3.0, 4.9], [0.0, 0.0], [0.0, 1e-9]]])
    assert has_moved(output, reference, 0.2).tolist() == [[True, False, False, True]]


# --- the mode ------------------------------------------------------------------------------------------------------


@given(
    tolerance=st.floats(0, 0.6),
    tilt=st.floats(-1, 1),
    spread_layers=st.none() | st.integers(1, 2),
    changed=st.sampled_from([0.02, 0.1, 0.3]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=15)
def test_equals_the_patch_by_patch_reference_over_a_longer_video(tolerance, tilt, spread_layers, changed, seed):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    model = NeuroFlowSiglipVisionModel.from_siglip(
        lively(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION | sizes)))
    )
    options = {"mode": "propagate", "threshold": 0.01, "tolerance": tolerance, "tolerance_tilt": tilt}
    options["spread_layers"] = spread_layers
    naive, stream = NaiveStream(model, NeuroFlowGateConfig(**options)), model.new_stream(**options)
    for frame in random_video(8, seed=seed, size=16, changed=changed):
        pooled, seen, _ = naive.step(frame)
        output = model(pixel_values=frame, stream=stream)
        torch.testing.assert_close(output.last_hidden_state[0], seen, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.pooler_output[0], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signal", ["patch", "token"])
def test_no_tolerance_and_no_threshold_equal_dense(vision, stock_vision, signal):
    stream = vision.new_stream(2, mode="propagate", threshold=0, tolerance=0, signal=signal)
    skipped = []
    for frame in random_video(12, batch_size=2, changed=0.05):
        output, dense = vision(pixel_values=frame, stream=stream), stock_vision(pixel_values=frame)
        torch.testing.assert_close(output.last_hidden_state, dense.last_hidden_state, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(output.pooler_output, dense.pooler_output, rtol=1e-4, atol=2e-5)
        skipped += output.skip_rate.tolist()
    assert max(skipped) > 0.9


def few_changes(num_frames, seed=0):
    """A video in which two to four patches of the 36 change from frame to frame."""
    return random_video(num_frames, seed=seed, changed=0.08)


def test_no_spreading_is_context(vision):
    frames = few_changes(6)
    spreading = play(vision, frames, vision.new_stream(mode="propagate", tolerance=1e9))
    context = play(vision, frames, vision.new_stream(mode="context"))
    assert all(output.skip_rate > 2 / 3 for output in context[1:])
    for output, expected in zip(spreading, context, strict=True):
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_tolerance_costs_less_and_is_further_from_dense(vision, stock_vision, seed):
    frames = few_changes(12, seed)
    dense = [stock_vision(pixel_values=frame).last_hidden_state for frame in frames]
    costs, errors = [], []
    for tolerance in (0, 0.01, 0.1, 0.3, 1.0, 10.0):
        outputs = play(vision, frames, vision.new_stream(mode="propagate", tolerance=tolerance))
        costs.append(sum(output.cost.item() for output in outputs))
        errors.append(sum((o.last_hidden_state - d).norm().item() for o, d in zip(outputs, dense, strict=True)))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.2 * costs[-1]
    assert errors[0] < errors[2] < errors[-1]


def test_a_tilt_shifts_where_patches_join(vision):
    joined = {}
    for tilt in (-1.0, 1.0):
        stream = vision.new_stream(mode="propagate", tolerance=0.3, tolerance_tilt=tilt)
        counts = active_counts(vision, stream, few_changes(6))
        joined[tilt] = [sum(layer) for layer in zip(*counts, strict=True)]
    assert joined[-1.0][0] == joined[1.0][0]  # what enters the first layer
    assert joined[-1.0][1] > joined[1.0][1]  # what leaves it


def active_counts(model, stream, frames):
    """For each frame, how many patches enter each layer, and how many leave the last."""
    counts = []

    def note(module, args, kwargs, output):
        step = kwargs["step"]
        if step.index == 0:
            counts.append([sum(step.active.counts)])
        counts[-1].append(sum(step.output.active.counts))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.encoder.layers]
    try:
        play(model, frames, stream)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_changes_spread_in_the_last_layers_only_if_so_asked(vision):
    frames = few_changes(5)
    stream = vision.new_stream(mode="propagate", tolerance=0, spread_layers=2)
    for entering, after_first, after_second, _ in active_counts(vision, stream, frames)[1:]:
        assert entering == after_first < after_second == NUM_PATCHES
    assert set(stream.layer_memories[0]) == {"key", "value"}
    assert len(stream.layer_memories[1]) == 8
    everywhere = vision.new_stream(mode="propagate", tolerance=0, spread_layers=99)
    for entering, after_first, *_ in active_counts(vision, everywhere, frames)[1:]:
        assert entering < after_first == NUM_PATCHES


def test_above_a_third_a_layer_is_computed_in_full(vision):
    frame, other = random_video(2, changed=1.0)
    for budget, leaving in ((12, 12), (13, NUM_PATCHES)):
        stream = vision.new_stream(mode="propagate", token_budget=budget, tolerance=1e9)
        (_, counts) = active_counts(vision, stream, [frame, other])
        assert counts == [budget, leaving, leaving, leaving]


def test_the_gate_is_reported_and_remembered_as_it_chose(vision):
    """`active_mask`, `skip_rate` and the references are the gate's; what joins later is seen in the output alone."""
    background, changed = random_video(2, changed=0.1)
    stream = vision.new_stream(mode="propagate", tolerance=0, max_age=100)
    first, second = play(vision, [background, changed], stream)
    chosen = second.active_mask.flatten()
    assert second.skip_rate.item() == pytest.approx(1 - chosen.sum().item() / NUM_PATCHES)
    assert torch.equal(stream.memory["age"][0] == 0, chosen)
    moved = (second.last_hidden_state != first.last_hidden_state).any(-1)[0]
    assert moved.all() and not chosen.all()


@given(
    batch_size=st.integers(2, 4),
    seed=st.integers(0, 1000),
    changes=st.lists(st.sampled_from([0.0, 0.03, 0.1, 0.5]), min_size=4, max_size=4),
    reset=st.none() | st.integers(0, 1),
)
@settings(deadline=None, max_examples=15)
def test_a_ragged_batch_is_as_many_single_streams(vision, batch_size, seed, changes, reset):
    videos = [random_video(6, seed=seed + index, changed=changes[index]) for index in range(batch_size)]
    options = {"mode": "propagate", "threshold": 0.01, "tolerance": 0.15}
    singles = [vision.new_stream(**options) for _ in videos]
    batched = vision.new_stream(batch_size, **options)
    for step, frames in enumerate(zip(*videos, strict=True)):
        if step == 3 and reset is not None:
            batched.reset(reset)
            singles[reset].reset()
        output = vision(pixel_values=torch.cat(frames), stream=batched)
        for index, frame in enumerate(frames):
            expected = vision(pixel_values=frame, stream=singles[index])
            torch.testing.assert_close(output.cost[index], expected.cost[0])
            torch.testing.assert_close(
                output.last_hidden_state[index], expected.last_hidden_state[0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("least_mass", [0.1, 0.97], ids=["as_is", "rows_worn_out_early"])
def test_cost_is_what_a_counter_sees_when_patches_join_and_rows_wear_out(vision, monkeypatch, least_mass):
    monkeypatch.setattr(neuroflow_propagate, "LEAST_MASS", least_mass)
    worn_out = []
    monkeypatch.setattr(
        neuroflow_propagate, "is_worn_out", lambda state: worn_out.append(is_worn_out(state)) or worn_out[-1]
    )
    model = eager(vision)
    stream = model.new_stream(mode="propagate", tolerance=0.3)
    frames = few_changes(8)
    _, dense = counted(lambda: model(pixel_values=frames[0]))
    for frame in frames:
        output, multiply_adds = counted(lambda frame=frame: model(pixel_values=frame, stream=stream))
        gate_work = 4 * NUM_PATCHES * model.config.hidden_size
        assert output.cost.item() == pytest.approx((multiply_adds + gate_work) / dense, rel=1e-5)
    assert torch.cat(worn_out).any() or least_mass == 0.1
    assert any(counts[0] < counts[-1] < NUM_PATCHES for counts in active_counts(model, stream, frames))


@pytest.mark.parametrize("spread_layers", [None, 1])
def test_restored_in_the_middle_it_continues_bit_for_bit(vision, tmp_path, spread_layers):
    frames = [
        torch.cat(pair) for pair in zip(few_changes(10, seed=1), random_video(10, seed=2, changed=0.02), strict=True)
    ]
    options = {"mode": "propagate", "tolerance": 0.2, "spread_layers": spread_layers}
    stream = vision.new_stream(2, **options)
    play(vision, frames[:5], stream)
    state = stream.state_dict()
    stream.save(tmp_path / "stream.safetensors")
    expected = play(vision, frames[5:], stream)
    restored = vision.new_stream(2, **options)
    restored.load_state_dict(state)
    for continued in (restored, NeuroFlowStream.load(tmp_path / "stream.safetensors")):
        for output, other in zip(play(vision, frames[5:], continued), expected, strict=True):
            for name in ("pooler_output", "last_hidden_state", "cost"):
                assert torch.equal(output[name], other[name])
        for name, tensor in stream.named_memory().items():
            assert torch.equal(continued.named_memory()[name], tensor)


@pytest.mark.parametrize(
    "name, spoilt, words",
    [
        ("layers.0.log_mass", torch.zeros(1, 36, 3), r"\(1, 36, 3\); expected \(1, 36, 4\)"),
        ("layers.0.output", torch.zeros(1, 36, 32, dtype=torch.bfloat16), "bfloat16; expected torch.float32"),
        ("layers.0.input", None, "`layers.0.input` has shape None"),
    ],
)
def test_a_state_with_other_memories_is_refused(vision, name, spoilt, words):
    stream = vision.new_stream(mode="propagate")
    play(vision, few_changes(2), stream)
    state = stream.state_dict()
    state["memory"] = {key: tensor for key, tensor in state["memory"].items() if key != name}
    if spoilt is not None:
        state["memory"][name] = spoilt
    with pytest.raises(ValueError, match=words):
        vision.new_stream(mode="propagate").load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes(dtype):
    torch.manual_seed(0)
    model = NeuroFlowSiglipVisionModel.from_siglip(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION)).to(dtype))
    stream = model.new_stream(mode="propagate")
    play(model, few_changes(3), stream)
    # a layer: key, value, query, input, reference; in float32 the output and, for 4 heads, two masses
    layer = NUM_PATCHES * (5 * 32 * dtype.itemsize + 4 * (32 + 2 * 4))
    assert stream.nbytes == 3 * layer + dtype.itemsize * 32 * (2 * NUM_PATCHES + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_stays_finite_and_near_single(vision, dtype):
    half = NeuroFlowSiglipVisionModel.from_siglip(
        lively(SiglipVisionModel(SiglipVisionConfig(**TINY_VISION))).to(dtype)
    )
    half.load_state_dict(vision.state_dict())
    frames = few_changes(40)
    outputs = play(half, frames, half.new_stream(mode="propagate", tolerance=0.1))
    single = play(vision, frames, vision.new_stream(mode="propagate", tolerance=0.1))
    for output, expected in zip(outputs, single, strict=True):
        assert output.pooler_output.isfinite().all()
        assert torch.cosine_similarity(output.pooler_output.float(), expected.pooler_output).item() > 0.995
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for output in play(vision, frames[:10], vision.new_stream(mode="propagate")):
            assert output.pooler_output.isfinite().all()


def test_gradients_reach_the_active_patches_through_what_joins(vision):
    """A patch that joins does so for the keys and values of those that changed."""
    background, changed = random_video(2, changed=0.08)
    stream = vision.new_stream(mode="propagate", tolerance=0.0, threshold=0.01)
    play(vision, [background], stream)
    with torch.enable_grad():
        changed = changed.clone().requires_grad_(True)
        output = vision(pixel_values=changed, stream=stream)
        active = output.active_mask.flatten()
        output.last_hidden_state[0][~active].square().sum().backward()
    assert changed.grad.isfinite().all()
    per_patch = changed.grad[0].abs().sum(0).unfold(0, 4, 4).unfold(1, 4, 4).sum((-1, -2)).flatten()
    assert (per_patch[active] > 0).all()
    assert (per_patch[~active] == 0).all()
