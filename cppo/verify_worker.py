"""The child process of `cppo.rewards.Judge`: reads [response, gold] as JSON lines, writes a verdict as a JSON line each.

Not imported by the package: it is run as `python -m cppo.verify_worker [memory limit in bytes]`.
"""

import json
import logging
import resource
import signal
import sys


def main() -> None:
    """Judge until standard input ends."""
    # SIGTERM reaches every process of a cluster's job; the parent finishes its iteration first and needs verdicts for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from math_verify import LatexExtractionConfig, parse, verify

    # The parent's wall-clock deadline is the only one: math-verify's own uses signals and takes at least a second.
    logging.disable(logging.CRITICAL)
    boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    if len(sys.argv) > 1:
        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def verdict(response: str, gold: str) -> float | None:
        gold_parsed = parse(f"${gold}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
        if not gold_parsed:
            return None
        answer = parse(response, extraction_config=boxed, parsing_timeout=None, fallback_mode="no_fallback")
        return float(verify(gold_parsed, answer, timeout_seconds=None))

    print("ready", flush=True)
    for line in sys.stdin:
        response, gold = json.loads(line)
        try:
            found = verdict(response, gold)
        except (MemoryError, RecursionError):
            found = None
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
