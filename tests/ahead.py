"""An accelerator that chooses tokens ahead, by the reference, and ways to do it wrong."""

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.ops.sampling import greedy_token, sample_token


class FourAhead(Accelerator):
    """Chooses up to four tokens before anyone looks at them. `asked` is how many, call by call; some calls it `declines`."""

    ahead = 4

    def __init__(self, *, declines=(), flaw=None):
        super().__init__("four ahead")
        self.asked, self.declines, self.flaw = [], declines, flaw

    def decode_tokens(self, step, token_ids, positions, remaining, params, cache, config, *, count, uniform=None, **settings):
        self.asked.append(count)
        if len(self.asked) in self.declines:
            return None
        found = []
        for i in range(count):
            places = positions + (0 if self.flaw == "counter" else np.minimum(i, remaining))
            if self.flaw == "next position":
                places = places + 1
            if self.flaw == "limits" and i:
                places = positions + i
            logits = step(token_ids[:, None], np.ones((len(token_ids), 1), bool), places, params, cache, config)
            if self.flaw == "first row":
                logits = np.repeat(logits[:1], len(logits), 0)
            draws = None if uniform is None else uniform[0 if self.flaw == "first draw" else i]
            chosen = greedy_token(logits) if draws is None else sample_token(logits, draws, **settings)
            token_ids = token_ids if self.flaw == "same token" else chosen
            found.append(chosen)
        return np.stack(found, 1)


FLAWS = ("counter", "next position", "limits", "first row", "first draw", "same token")
