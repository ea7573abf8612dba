"""The suite is itself tested: each planted fault of `mutants.py` must be rejected by a test that the unmutated code passes.

The tests are the project's own, called here as they are; `TESTS` says which of them look after which area, cheapest first.
`conftest.py` prints how many faults were rejected.
"""

import warnings
from functools import partial

import pytest
import test_generate
import test_goldens
import test_laws
import test_numbers
import test_ops
import test_weights
from hypothesis import Phase, settings
from mutants import MUTANTS, REORDERINGS

from refmodels import OPTBackbone

ORACLE = test_ops.test_op_agrees_with_the_oracle


def oracle(name):
    """The test of this primitive with the very examples that it has when pytest runs it, up to the first that fails."""
    phases = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
    unshrunk = settings(test_ops.PROFILE, phases=phases, report_multiple_bugs=False)
    node = f"tests/test_ops.py::{ORACLE.__name__}[{name}]".encode()  # Hypothesis' plugin for pytest seeds by it

    def agrees():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ORACLE, "_hypothesis_internal_use_settings", unshrunk)
            patch.setattr(ORACLE.hypothesis.inner_test, "_hypothesis_internal_add_digest", node, raising=False)
            ORACLE(name)

    return agrees


def peers(name, *keras_hub):
    """The tests of a golden of Transformers, then of goldens of KerasHub."""
    judged = [partial(test_goldens.test_keras_hub, f"keras_hub_{version}") for version in keras_hub]
    return [partial(test_goldens.test_transformers, name), *judged]


def generation(name, kind):
    return [partial(test_goldens.test_transformers_generation, name, kind, {"num_beams": 4} if kind == "beam4" else {})]


DRAWN = {"sampler": "random", "seed": [4, 5, 6]}
TESTS = {name: [oracle(name)] for name in test_ops.PRIMITIVES} | {
    "attention": [
        test_ops.test_attention_is_its_equation,
        partial(test_numbers.test_attention_does_not_round_its_scores_to_half, "float16"),
    ],
    "buckets": [test_ops.test_bucket_boundaries_one_by_one],
    "masked": [partial(test_ops.test_masked_keys_weigh_nothing_whatever_they_hold, "float32")],
    "cancellation": [test_ops.test_layer_norm_does_not_cancel],
    "opt": peers("opt"),
    "opt_positions": [test_laws.test_opt_without_position_ids_counts_from_the_first_column],
    "opt_generation": generation("opt", "greedy"),
    "opt_beam": generation("opt", "beam4"),
    "bloom": peers("bloom"),
    "bloom_6_heads": peers("bloom_6_heads"),
    "ragged": [partial(test_goldens.test_a_ragged_batch_gives_what_transformers_gives_for_each_prompt_alone, "opt")],
    "t5": [*peers("t5_relu_tied"), *peers("t5_gated_gelu_untied")],
    "t5_tied": generation("t5_relu_tied", "beam4") + peers("t5_relu_tied"),
    "t5_gated": peers("t5_gated_gelu_untied"),
    "t5_float16": [partial(test_numbers.test_the_residual_stream_of_t5_does_not_overflow, "float16")],
    "zero_masks": [partial(test_goldens.test_keras_hub, "keras_hub_0.32/t5_zero_masks")],
    "weights": [test_weights.test_layouts_by_index],
    "stop": [partial(test_generate.test_a_stop_token_ends_its_row_alone, "opt")],
    "beam_stop": [test_generate.test_beams_set_finished_hypotheses_aside_and_weigh_their_length],
    "seeds": [partial(test_generate.test_a_ragged_batch_gives_what_each_prompt_gives_alone, "opt", DRAWN)],
    "frequencies": [partial(test_ops.test_sample_token_draws_with_the_right_frequencies, {"top_p": 0.6})],
    "dropout_sites": [
        partial(test_laws.test_dropout_stands_where_the_originals_have_it, "opt", 6),
        partial(test_laws.test_dropout_stands_where_the_originals_have_it, "bloom", 6),
    ],
    "default_mask": [partial(test_numbers.test_without_a_mask_every_token_is_real, OPTBackbone)],
}


def call(test):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mutant may warn as it pleases
        test()


@pytest.mark.parametrize("area", TESTS)
def test_the_unmutated_code_passes(area):
    for test in TESTS[area]:
        call(test)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_rejected(mutant):
    for test in (test for area in mutant.areas for test in TESTS[area]):
        with mutant.plant():
            try:
                call(test)
            except AssertionError:  # anything else is a mutant that crashes, which any test would reject
                return
    pytest.fail(f"survived: {mutant.name}: {mutant.fault}")


@pytest.mark.parametrize("mutant", REORDERINGS, ids=lambda mutant: mutant.name)
def test_the_same_sums_in_another_order_are_accepted(mutant):
    for test in (test for area in mutant.areas for test in TESTS[area]):
        with mutant.plant():
            call(test)


def test_there_are_enough_of_them():
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
