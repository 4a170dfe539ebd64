"""Error feedback on several ranks: nothing is lost, nothing differs, and it converges."""

from pathlib import Path

import pytest
import torch

from gangline.comm.compression_settings import CompressionSettings
from gangline.trainers.gradient_compression import GradientCompression

SCENARIOS = Path(__file__).with_name("compression_scenarios.py")
TOP = {"kind": "top_k", "fraction": 0.01}
ALL: list[dict] = [
    TOP,
    {"kind": "identity"},
    {"kind": "rand_k", "fraction": 0.1},
    {"kind": "dithering", "bits": 4},
    {"kind": "natural"},
    {"kind": "scaled_sign"},
    {"kind": "group_sign", "group_size": 50},
]


@pytest.mark.ranks
@pytest.mark.parametrize("settings", [TOP, {"kind": "top_k", "fraction": 0.3}], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_was_sent_and_what_is_left_are_the_gradients_to_the_last_bit(
    rank_pool, settings, world_size
):
    found = rank_pool.run(
        world_size, (SCENARIOS, "what_is_sent_and_kept_adds_up"), settings=settings, exact=True
    )
    for rank in found:
        assert rank["error"] == 0.0
        assert rank["kept"] > 0.1, "nothing was left out, so nothing was tested"
        assert rank["digests"] == found[0]["digests"], "replicas differ"


@pytest.mark.ranks
@pytest.mark.parametrize("settings", ALL, ids=str)
def test_replicas_agree_and_lose_no_more_than_the_rounding(rank_pool, settings):
    found = rank_pool.run(
        3, (SCENARIOS, "what_is_sent_and_kept_adds_up"), settings=settings, exact=False
    )
    assert found[0]["digests"] == found[1]["digests"] == found[2]["digests"]
    if settings["kind"] in ("top_k", "scaled_sign", "group_sign"):
        # 20 steps of three residuals, each rounded once or twice to 2^-24 of at most the largest.
        assert found[0]["error"] < 1e-5
    if settings["kind"] == "identity":
        assert found[0]["error"] < 1e-6


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("settings", "value"),
    [(TOP, "inf"), (TOP, "nan"), ({"kind": "natural"}, "nan"), ({"kind": "natural"}, "3e38")],
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_seen_by_all_and_leaves_no_trace(
    rank_pool, settings, value
):
    rank_pool.run(
        2, (SCENARIOS, "a_bad_gradient_spoils_only_its_step"), settings=settings, value=value
    )


@pytest.mark.ranks
def test_other_settings_on_another_rank_are_refused_on_both(rank_pool):
    found = rank_pool.run(2, (SCENARIOS, "other_settings_are_refused"))
    assert all("must have the same compression settings" in text for text in found)


@pytest.mark.ranks
def test_on_one_rank_nothing_is_compressed_and_the_residual_flows_out(rank_pool):
    rank_pool.run(2, (SCENARIOS, "a_single_rank_takes_what_was_left"), expert_parallel=2)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((3, 1), (3, 1)), ((3, 1), (2, 1)), ((2, 1), (3, 1)), ((3, 1), (1, 1)), ((4, 2), (2, 2)),
     ((2, 2), (4, 2)), ((4, 2), (4, 1)), ((2, 1), (4, 4))],
    ids=str,
)  # fmt: skip
def test_a_residual_goes_to_another_number_of_ranks_with_its_sum(
    rank_pool, tmp_path, saved, loaded
):
    (ranks, degree), (new_ranks, new_degree) = saved, loaded
    before = rank_pool.run(
        ranks, (SCENARIOS, "save_residual"), expert_parallel=degree, root=str(tmp_path)
    )
    after = rank_pool.run(
        new_ranks, (SCENARIOS, "load_a_residual"), expert_parallel=new_degree, root=str(tmp_path)
    )
    assert len({rank["mine"] for rank in before}) == ranks
    for rank in after:
        assert rank["sums"] == before[0]["sums"]
    if saved == loaded:
        assert [rank["mine"] for rank in after] == [rank["mine"] for rank in before]


@pytest.mark.ranks
def test_a_checkpoint_without_a_residual_begins_with_zero_and_says_so(rank_pool, tmp_path):
    (line, _) = rank_pool.run(2, (SCENARIOS, "load_where_there_is_none"), root=str(tmp_path))
    assert "begin with zero" in line


@pytest.mark.ranks
def test_the_largest_hundredth_with_feedback_converges_where_without_it_does_not(rank_pool):
    def run(error_feedback):
        found = rank_pool.run(
            2,
            (SCENARIOS, "descend"),
            settings=TOP,
            error_feedback=error_feedback,
            num_steps=1500,
        )
        assert found[0] == found[1], "replicas differ"
        return found[0]

    plain, fed_back = run(False), run(True)
    assert fed_back["end"] < 0.04
    assert fed_back["end"] < 0.5 * fed_back["half"], "it no longer descends"
    # Each rank sends the entries that pull it to its own minimum, for ever the same ones.
    assert plain["end"] > 0.6
    assert plain["end"] > 0.99 * plain["half"]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_with_feedback_every_compressor_is_contractive_and_leaves_a_residual(settings):
    checked = CompressionSettings.model_validate(settings)
    for error_feedback in (True, False):
        made = GradientCompression(checked, error_feedback=error_feedback, seed=0)
        made.attach(torch.zeros(4))
        assert (made.residual is not None) == error_feedback
        assert made.compressor.kind == "contractive" or not error_feedback
