"""The side of `refmodels bench --peers` that is Transformers, on the processor."""

import pytest

from refmodels.bench_worker import Transformers, Work
from refmodels.bloom import BloomBackbone
from refmodels.opt import OPTBackbone
from refmodels.t5 import T5Backbone

SMALL = {"vocabulary_size": 40, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24, "dtype": "bfloat16"}


@pytest.mark.parametrize("model", [OPTBackbone, BloomBackbone])
def test_it_generates_eagerly_in_the_shape_that_is_asked_for(transformers, model):
    shape = model(**SMALL | ({"intermediate_dim": 64} if model is BloomBackbone else {}))
    system = Transformers(shape, "cpu", compiled=False)
    surplus = 2 * shape.hidden_dim if model is OPTBackbone else 0  # its table of positions has two rows in front
    assert sum(parameter.numel() for parameter in system.model.parameters()) == shape.count_params() + surplus
    assert {parameter.dtype for parameter in system.model.parameters()} == {system.torch.bfloat16}
    assert system.seconds(Work("generate", 2, 5, 3)) > 0
    assert not hasattr(system.model, "_compiled_call")
    assert {"torch", "transformers"} <= set(system.about())


def test_it_compiles_the_decoding(transformers):
    system = Transformers(OPTBackbone(**SMALL), "cpu", compiled=True)
    system.model.generation_config.compile_config.backend = "eager"  # traced as ever; nothing is made of it, which takes long
    before = system.torch._dynamo.utils.counters["frames"]["ok"]
    assert system.seconds(Work("generate", 1, 5, 4)) > 0
    assert system.torch._dynamo.utils.counters["frames"]["ok"] > before
    system.model.generation_config.disable_compile = True
    del system.model._compiled_call
    with pytest.raises(RuntimeError, match="compiled nothing"):
        system.seconds(Work("generate", 1, 5, 4))


def test_it_encodes(transformers):
    shape = T5Backbone(**SMALL)
    system = Transformers(shape, "cpu", compiled=False)
    assert system.encoder is system.model.get_encoder()
    assert system.seconds(Work("encode", 2, 8)) > 0
    compiled = Transformers(shape, "cpu", compiled=True)
    assert isinstance(compiled.encoder, compiled.torch._dynamo.eval_frame.OptimizedModule)
