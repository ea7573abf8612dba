"""The suite is itself tested: each planted fault of `mutants.py` must be rejected by a test that the unmutated code passes.

The tests are the project's own, called here as they are; `TESTS` says which of them look after which area, cheapest first.
`conftest.py` prints how many faults were rejected.
"""

import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import test_generate
import test_goldens
import test_laws
import test_lora
import test_numbers
import test_ops
import test_preprocessors
import test_quantize
import test_samplers
import test_saving
import test_scoring
import test_tasks
import test_torch_bin
import test_variants
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


def transformers_generation(name, case):
    return [partial(test_samplers.test_penalties_n_grams_constraints_and_several_beams_are_transformers, name, case)]


def in_a_directory(test, *arguments):
    def run():
        with tempfile.TemporaryDirectory() as directory:
            test(*arguments, Path(directory))

    return [run]


DRAWN = {"sampler": "random", "seed": [4, 5, 6]}
ROWS = {"temperature": [None, 3.0, None], "seed": 1}
TESTS = {name: [oracle(name)] for name in test_ops.PRIMITIVES} | {
    "attention": [
        test_ops.test_attention_is_its_equation,
        partial(test_numbers.test_attention_does_not_round_its_scores_to_half, "float16"),
    ],
    "buckets": [test_ops.test_bucket_boundaries_one_by_one],
    "masked": [partial(test_ops.test_masked_keys_weigh_nothing_whatever_they_hold, "float32")],
    "cancellation": [test_ops.test_layer_norm_does_not_cancel],
    "opt": peers("opt"),
    "opt_350m": peers("opt_350m_style"),
    "opt_no_final_norm": [partial(test_variants.test_opt_is_its_equations, "no final norm")],
    "opt_positions": [test_laws.test_opt_without_position_ids_counts_from_the_first_column],
    "opt_generation": generation("opt", "greedy"),
    "opt_beam": generation("opt", "beam4"),
    "bloom": peers("bloom"),
    "bloom_6_heads": peers("bloom_6_heads"),
    "heads": [
        partial(test_variants.test_the_head_of_t5_scales_the_hidden_state_or_does_not, tied, scaled)
        for tied, scaled in ((True, False), (False, True))
    ],
    "head_files": [
        partial(test_variants.test_the_tensors_and_the_config_decide_about_the_head, case)
        for case in (("t5", "equal", False, True, "5.23.0"), ("opt", "equal", ..., False, ...))
    ],
    "vectors": [
        partial(test_variants.test_the_rows_of_the_table_give_what_the_ids_give, family, {}, "float32")
        for family in ("opt", "bloom", "t5")
    ],
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
    "rows": [partial(test_generate.test_a_ragged_batch_gives_what_each_prompt_gives_alone, "opt", ROWS)],
    "penalty": transformers_generation("opt", 0),
    "ngrams": transformers_generation("opt", 1),
    "beam_penalty": transformers_generation("opt", 3),
    "contrastive": [partial(test_samplers.test_contrastive_search_is_keras_hubs, "keras_hub_0.32/opt")],
    "several": [partial(test_samplers.test_each_of_several_draws_is_that_of_its_derived_seed, "opt")],
    "stop_text": [
        test_samplers.test_only_what_may_become_a_stop_string_is_held_back,
        test_samplers.test_text_is_cut_at_the_first_stop_string_however_it_falls_into_pieces,
    ],
    "dropout_sites": [
        partial(test_laws.test_dropout_stands_where_the_originals_have_it, "opt", 6),
        partial(test_laws.test_dropout_stands_where_the_originals_have_it, "bloom", 6),
    ],
    "score": [partial(test_scoring.test_scores_are_those_of_the_whole_sequence, family) for family in ("opt", "t5")],
    "score_targets": [test_scoring.test_targets_go_on_from_longer_inputs],
    "soft_prompt": [partial(test_tasks.test_the_vectors_of_tokens_give_what_the_tokens_give, "opt", {"num_beams": 3})],
    "packed": [partial(test_preprocessors.test_text_to_continue, "opt")],
    "exact_sum": [partial(test_quantize.test_the_sum_of_products_is_exact, 5000)],
    "quantise_int8": [
        partial(test_quantize.test_quantising_gives_keras_integers_and_scales_bit_for_bit, "t5_untied_int8"),
    ],
    "quantise_int4": [partial(test_quantize.test_quantising_gives_keras_integers_and_scales_bit_for_bit, "opt_int4")],
    "int8": [partial(test_quantize.test_keras_hub, "opt_int8")],
    "opt_lora": [partial(test_lora.test_keras_hub_with_and_without_its_adapter, "keras_hub_0.32/opt_lora")],
    "merged_lora": [test_lora.test_a_merged_kernel_by_hand],
    "enable_lora": [partial(test_lora.test_enable_lora, "opt")],
    "grouped_lora": in_a_directory(test_lora.test_adapters_of_any_shape_become_keras_hubs, "opt"),
    "lora_indices": [partial(test_lora.test_indices, "t5_not_gated")],
    "peft_rslora": in_a_directory(test_lora.test_scales, {"use_rslora": True}, 8 / 2**0.5),
    "peft_pattern": in_a_directory(test_lora.test_scales, {"alpha_pattern": {"c1": 6, "layers.1.fc1": 6}}, 4.0),
    "peft_fused": in_a_directory(test_lora.test_blooms_fused_module_is_three_layers, ""),
    "save_opt": in_a_directory(partial(test_saving.test_the_same_tensors_and_fields_as_transformers, name="opt")),
    "save_bloom": in_a_directory(partial(test_saving.test_the_same_tensors_and_fields_as_transformers, name="bloom")),
    "save_t5_gelu": [partial(test_saving.test_t5_feed_forward, "gelu", True, "gated-gelu_python")],
    "save_t5_flan": in_a_directory(partial(test_saving.test_the_same_config_as_keras_hub, name="t5_flan_like")),
    "torch_legacy": in_a_directory(test_torch_bin.test_storages_follow_in_the_order_of_their_keys),
    "torch_views": [test_torch_bin.test_the_golden_file_of_the_old_form],
    "empty": [test_ops.test_every_float_op_gives_empty_for_empty],
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
