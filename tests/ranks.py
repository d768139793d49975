"""What one process of a test on several ranks runs: `python ranks.py FILE FUNCTION RANK WORLD STORE OUTPUT SECONDS`.

It joins a gloo group, calls FUNCTION of FILE, and saves what that returns. See the fixture `run_ranks`.
"""

import datetime
import importlib.util
import sys

import torch
import torch.distributed as dist


def main(file: str, function: str, rank: int, world: int, store: str, output: str, seconds: int) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("on_a_rank", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    torch.save(getattr(module, function)(), output)
    dist.barrier()  # nobody leaves while another is still talking
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:7], int(sys.argv[7]))
