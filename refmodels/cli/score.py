"""`refmodels score`: how likely a text is, token by token."""

import argparse
import sys
from contextlib import redirect_stdout

from refmodels.cli.selection import chosen_accelerator
from refmodels.cli.streams import prompt_text
from refmodels.presets import locate
from refmodels.printing import aligned, print_json
from refmodels.task import Task


def run(arguments: argparse.Namespace) -> None:
    """`refmodels score`."""
    locate(arguments.preset)
    accelerator = chosen_accelerator(arguments)
    prompt = prompt_text(arguments.prompt)
    with redirect_stdout(sys.stderr):  # downloads report their progress on either stream
        task = Task.from_preset(arguments.preset, accelerator=accelerator, dtype=arguments.dtype)
    if arguments.target is None and task.backbone.family == "t5":
        raise ValueError("T5 answers a text: TARGET, the answer to score, is missing")
    score = task.score(prompt, arguments.target)
    tokens, log_probs = score.token_ids[0].tolist(), score.log_probs[0].tolist()
    pieces = [task.tokenizer.id_to_token(token) for token in tokens]
    total, perplexity = float(score.total[0]), None if not tokens else float(score.perplexity[0])
    if arguments.json:
        inputs = {"preset": arguments.preset, "text": prompt, "target": arguments.target}
        print_json({**inputs, "tokens": tokens, "log_probs": log_probs, "total": total, "perplexity": perplexity})
        return
    rows = [(f"{log_prob:.4f}", piece) for log_prob, piece in zip(log_probs, pieces, strict=True)]
    summary = f"{len(tokens)} tokens" + ("" if perplexity is None else f", perplexity {perplexity:.4g}")
    for line in aligned([*rows, (f"{total:.4f}", summary)], right=(0,)):
        print(line)
