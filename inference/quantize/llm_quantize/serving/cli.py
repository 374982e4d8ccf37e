"""The command that `run_vllm.sh` calls: prints the plan for a model, or why vLLM would not serve it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llm_quantize.serving.plan import ServingPlan, plan_serving
from llm_quantize.serving.refusal import Refusal, one_line


def main(argv: Sequence[str]) -> int:
    """Run the command on `argv`, the device, the model and the user's further arguments; return the exit code.

    Writes to stdout the model, `local` or `hub`, and the arguments for vLLM, each followed by a NUL byte; to stderr
    one line for each note. Exit code 2 with one line on stderr where the model is refused.
    """
    device, model, *words = argv
    try:
        plan = readable_plan(device, model, words)
    except Refusal as refusal:
        print(f"run_vllm.sh: {one_line(refusal)}", file=sys.stderr)
        return 2
    for note in plan.notes:
        print(f"run_vllm.sh: note: {one_line(note)}", file=sys.stderr)
    fields = [plan.model, "local" if plan.is_local else "hub", *plan.arguments]
    sys.stdout.buffer.write(b"".join(os.fsencode(item) + b"\0" for item in fields))
    return 0


def readable_plan(device: str, model: str, words: Sequence[str]) -> ServingPlan:
    """Return the plan for a model; raises `Refusal` also where the system does not let its files be read."""
    try:
        return plan_serving(device, model, words)
    except OSError as error:
        raise Refusal(
            f"{model[:200]} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error
