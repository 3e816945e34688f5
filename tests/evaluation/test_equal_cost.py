"""Figures of an evaluation: known answers, mixtures of baselines, intervals; videos out of folders."""

import numpy as np
import pytest

from neuroflow_hf.evaluation.datasets import chosen_labels, class_words, find_videos
from neuroflow_hf.evaluation.equal_cost import (
    Outcome,
    affordable,
    compare,
    enough_to_draw,
    frame_draws,
    outcome_figures,
    questions,
    shares_at,
    verdict,
)
from neuroflow_hf.evaluation.methods import MethodSpec


def outcome(name="x", cost=0.2, cosine=0.9, videos=2, frames=20, control=False, family="x", **more):
    """A method that costs and keeps the same on every frame, or has these cosines in all videos together."""
    cosines = np.broadcast_to(cosine, videos * frames).astype(float)
    unknown = {"skip": [np.full(frames, np.nan)] * videos, "milliseconds": [1.0] * videos}
    spec = MethodSpec(name, family, "every" if control else "stream", control=control)
    return Outcome(spec, [np.full(frames, cost)] * videos, np.split(cosines, videos), **unknown, **more)


MEAN, P5, _ = questions(outcome())


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_of_a_method():
    labelled = {"agrees": [np.array([True, False])], "ranks": [0, 1, 6, 0]}
    ours = outcome(cosine=np.linspace(0, 1, 101), videos=1, frames=101, **labelled)
    dense = outcome(videos=1, frames=101, ranks=[0, 0, 0, 0])
    found = outcome_figures(ours, dense, labels=9)
    assert found["cost"] == pytest.approx(0.2) and found["skip_rate"] is None
    assert found["cosine"] == pytest.approx({"mean": 0.5, "p5": 0.05, "p1": 0.01, "min": 0})
    assert found["agreement"] == 0.5
    accuracy = found["accuracy"]
    assert (accuracy["top1"], accuracy["top5"]) == (0.5, 0.75)
    assert accuracy["top1_retention"] == 0.5 and accuracy["top1_only_dense"] == 2
    low, high = accuracy["top1_interval"]
    assert 0 < low < 0.5 < high < 1
    # among five labels, one of the best five is no answer
    assert "top5" not in outcome_figures(ours, dense, labels=5)["accuracy"]


def cost_of(one):
    return one.mean_cost


def test_between_two_settings_is_their_mixture():
    assert shares_at([0.4, 0.0, 0.2], 0.1) == [(0.5, 1), (0.5, 2)]
    settings = [outcome(cost=cost, cosine=cosine, name=f"{cost}") for cost, cosine in ((0.1, 0.8), (0.3, 0.9))]
    ours, families = outcome(cost=0.15), {"every k": settings}
    mixture = affordable(families, 0.15, cost_of)[0]
    assert mixture.mean(cost_of) == pytest.approx(0.15) and mixture.family == "every k"
    assert compare(ours, families, MEAN, samples=10)["best"] == "75% 0.1, 25% 0.3"
    assert affordable(families, 0.05, cost_of) == []  # nothing so cheap
    assert affordable(families, 0.5, cost_of)[0].parts == [(1.0, settings[1])]  # a baseline that costs less


def test_the_best_baseline_is_named_for_each_figure():
    ours = outcome(cost=0.2, cosine=0.95)
    varying = np.where(np.arange(40) < 4, 0.5, 0.99)
    families = {
        "steady": [outcome("steady 1", 0.1, 0.9, control=True), outcome("steady 2", 0.3, 0.9, control=True)],
        "varying": [outcome("varying", 0.2, varying, control=True)],
        "expensive": [outcome("expensive", 0.9, 1.0, control=True)],
    }
    mean, p5 = (compare(ours, families, one, samples=200) for one in (MEAN, P5))
    assert set(mean["controls"]) == {"steady", "varying"}
    assert mean["family"] == "varying" and mean["control"] == pytest.approx(varying.mean())
    assert p5["family"] == "steady" and p5["difference"] == pytest.approx(0.05)
    assert p5["verdict"] == "above" and p5["interval"] == pytest.approx([0.05, 0.05])
    assert mean["interval"][0] < mean["difference"] < mean["interval"][1]
    below = compare(outcome(cost=0.2, cosine=0.8), families, MEAN, samples=200)
    assert below["verdict"] == "below"
    assert compare(outcome(cost=0.01), families, MEAN) is None


def test_a_cheaper_baseline_that_is_better_is_not_passed_over():
    settings = [outcome("cheap", 0.1, 0.9, control=True), outcome("expensive", 0.3, 0.8, control=True)]
    found = compare(outcome(cost=0.2, cosine=0.87), {"family": settings}, MEAN, samples=50)
    assert found["best"] == "cheap" and found["controls"] == {"family": pytest.approx(0.9)}
    assert found["verdict"] == "below"


def test_a_method_against_itself_is_level():
    ours = outcome(cosine=np.random.default_rng(0).random(40))
    for question in questions(ours):
        found = compare(ours, {"same": [ours]}, question, samples=50)
        assert found["difference"] == 0 and found["interval"] == [0, 0] and found["verdict"] == "level"


def test_few_videos_say_nothing_about_labels():
    ours, control = (outcome(ranks=ranks, control=bool(sum(ranks))) for ranks in ([0, 0], [1, 1]))
    found = compare(ours, {"control": [control]}, questions(ours, labels=3)[-1])
    assert found["difference"] == 1 and found["interval"] is None and found["verdict"] == "unknown"
    assert not enough_to_draw([1] * 4) and enough_to_draw([1] * 5) and enough_to_draw([20])
    assert verdict(1e-5, [1e-6, 2e-5]) == "level" and verdict(-0.1, [-0.2, -0.1]) == "below"


def test_draws_are_of_whole_videos_or_of_blocks():
    lengths = [3, 5, 2, 4, 6]
    firsts = np.cumsum([0, *lengths])
    whole = {tuple(range(firsts[place], firsts[place] + length)) for place, length in enumerate(lengths)}
    for drawn in frame_draws(lengths, 20, 0):
        starts = [place for place in range(len(drawn)) if drawn[place] in firsts]
        parts = [tuple(drawn[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(drawn)], strict=True)]
        assert len(parts) == 5 and set(parts) <= whole
    for drawn in frame_draws([25, 7], 20, 0):
        assert len(drawn) == 32 and (drawn[:25] < 25).all() and (drawn[25:] >= 25).all() and drawn.max() < 32
        assert (np.diff(drawn[:10]) == 1).all()
    (first,), (again,), (other,) = (list(frame_draws([30], 1, seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


# --- videos --------------------------------------------------------------------------------------------------------


def test_folders_become_words():
    found = list(map(class_words, ("ApplyEyeMakeup", "apply_eye_makeup", "TVShow2", "Straßenbahn", "犬", "!!")))
    assert found == ["apply eye makeup", "apply eye makeup", "tv show 2", "straßenbahn", "犬", "!!"]


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_subfolders_are_classes(tmp_path):
    make_files(tmp_path, "RedCircle/b.MP4", "RedCircle/a.avi", "dog/c.mkv", "dog/notes.txt", ".git/x.mp4", "README.md")
    found = find_videos(tmp_path)
    assert [video.name for video in found.videos] == ["RedCircle/a.avi", "RedCircle/b.MP4", "dog/c.mkv"]
    assert [video.truth for video in found.videos] == ["red circle", "red circle", "dog"]
    assert found.classes == ("red circle", "dog") and found.name == tmp_path.name
    assert chosen_labels(found, None) == found.classes
    assert chosen_labels(found, ["dog", "red circle", "cat"]) == ("dog", "red circle", "cat")
    with pytest.raises(ValueError, match="lacks 'red circle'"):
        chosen_labels(found, ["dog", "cat"])
    plain = find_videos(tmp_path, truth=False)
    assert plain.classes == () and all(video.truth is None for video in plain.videos)
    assert chosen_labels(plain, None) == () and chosen_labels(plain, ["cat", "dog"]) == ("cat", "dog")


def test_what_cannot_be_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no video in"):
        find_videos(make_files(tmp_path / "empty", "notes.txt"))
    with pytest.raises(ValueError, match=r"0 and 1 folders deep.*--no-truth"):
        find_videos(make_files(tmp_path / "mixed", "a.mp4", "dog/b.mp4"))
    with pytest.raises(ValueError, match="2 folders deep"):
        find_videos(make_files(tmp_path / "deep", "train/dog/b.mp4"))
    assert len(find_videos(tmp_path / "mixed", truth=False).videos) == 2
    assert find_videos(make_files(tmp_path / "twice", "RedDog/a.mp4", "red_dog/a.mp4")).classes == ("red dog",)
    with pytest.raises(ValueError, match=r"single label, 'dog'.*--no-truth"):
        chosen_labels(find_videos(make_files(tmp_path / "one", "dog/a.mp4")), None)


def test_a_file_and_the_shipped_clips():
    shipped = find_videos(None)
    assert [video.labelled for video in shipped.videos] == [True, False]
    assert "a dog" in chosen_labels(shipped, None) and chosen_labels(shipped, ["x", "y"]) == ("x", "y")
    (video,) = find_videos(shipped.videos[0].path).videos
    assert video.name == "things.mp4" and video.labelled
