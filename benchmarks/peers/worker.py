"""One peer in a process of its own, which trains when it is told to and sleeps in between.

python -m benchmarks.peers.worker --peer=NAME --config=JSON

`--config` is a RunConfig as JSON. The worker answers on stdout, one JSON object a line: first, when it has compiled and
warmed up, {"seconds_per_step", "parameters", "device", "versions"}; then {"images", "seconds"} for each line
{"steps": N} on stdin, until stdin ends. What fails is answered by {"error": one line}, after which the worker ends.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from facevae_jax import startup

CALIBRATION_SECONDS = 0.5


class Peer(NamedTuple):
    """Who makes a case."""

    module: str  # of benchmarks.peers
    variant: str = ""


PEERS = {
    "ours": Peer("ours"),
    "torch eager": Peer("torch_vae", "eager"),
    "torch eager channels-last": Peer("torch_vae", "eager channels-last"),
    "torch compile": Peer("torch_vae", "compile"),
    "torch compile channels-last": Peer("torch_vae", "compile channels-last"),
    "torch compile max-autotune channels-last bf16": Peer("torch_vae", "compile max-autotune channels-last bf16"),
    "keras fit (jax)": Peer("keras_vae", "jax"),
    "keras fit (torch)": Peer("keras_vae", "torch"),
    "pythae": Peer("pythae_vae"),
}


def serve(peer: Peer, config: dict[str, Any], say: Callable[..., None]) -> None:
    """Makes the case, says that it is ready and trains as often as stdin asks for it."""
    if peer.module == "keras_vae":
        os.environ["KERAS_BACKEND"] = peer.variant  # read as keras is imported
    module = importlib.import_module(f"benchmarks.peers.{peer.module}")
    from benchmarks.peers.case import calibrate
    from facevae_jax.config import RunConfig

    run_config = RunConfig.from_config_dict(config)
    case = module.make_case(run_config, peer.variant)
    seconds = calibrate(case.train, batch_size=run_config.train.batch_size, seconds=CALIBRATION_SECONDS)
    say(seconds_per_step=seconds, parameters=case.parameters, device=case.device, versions=case.versions)
    for line in sys.stdin:
        say(**case.train(json.loads(line)["steps"])._asdict())


def main() -> int:
    """Parses the flags and serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--config", type=json.loads, required=True)
    arguments = parser.parse_args()
    if arguments.peer == "ours":
        startup.use_huge_pages()  # as facevae_jax.main does; the others run as they come
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer

    def say(**fields: Any) -> None:
        print(json.dumps(fields), file=answers)

    try:
        serve(PEERS[arguments.peer], arguments.config, say)
    except Exception as error:  # of any library: the other peers go on
        say(error=traceback.format_exception_only(error)[0].strip().partition("\n")[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
