"""KerasHub as it is released, in a setting in which it has a defect, for `refmodels verify` (spec/defects/).

cd tests/peers
python -m refmodels verify defects_keras_hub:t5_1_1_gelu --like /tmp/t5_untied
"""

import json
import tempfile
from pathlib import Path


def t5_1_1_gelu(model):
    """A gated T5 as Google published it, its activation named as KerasHub's t5_1.1 presets name it."""
    import keras_hub

    from refmodels.verification.adaptors.keras_hub import KerasHubCandidate

    with tempfile.TemporaryDirectory() as place:
        model.save_to_preset(place)  # says gelu_approximate: what `gated-gelu` means in the checkpoints
        file = Path(place) / "config.json"
        config = json.loads(file.read_text())
        config["config"]["activation"] = "gelu"
        file.write_text(json.dumps(config))
        return KerasHubCandidate(keras_hub.models.Backbone.from_preset(place, dtype=model.config.dtype), model)
