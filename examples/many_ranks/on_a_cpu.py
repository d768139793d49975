"""The recipe of the small mixture on processes of a machine without GPUs, which talk by gloo.

    torchrun --nproc-per-node 2 examples/many_ranks/on_a_cpu.py megatron --ep 2 --steps 30
    torchrun --nproc-per-node 2 examples/many_ranks/on_a_cpu.py torchtitan --ep 2 --steps 30

Both engines take a GPU for granted. What stands in for it is that of the tests (`tests/peers/*_on_the_cpu.py`), so this
needs a clone, and the engine's environment: `make .venv-megatron/.installed`, `make .venv-torchtitan/.installed`.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "peers"))


def megatron(options):
    import megatron_on_the_cpu

    megatron_on_the_cpu.stand_in()
    import megatron_gpt

    megatron_gpt.main(["small", "--ep", str(options.ep), "--tp", str(options.tp), "--steps", str(options.steps)])


def torchtitan(options):
    import torchtitan_on_the_cpu  # before torchtitan is imported
    import torchtitan_qwen3
    from torchtitan.tools.logging import init_logger

    init_logger()
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group
    config = torchtitan_qwen3.small()
    torchtitan_on_the_cpu.dense_attention(config.model_spec.model)
    config.training.mixed_precision_param = "float32"
    config.training.steps = options.steps
    config.parallelism.expert_parallel_degree = options.ep
    config.parallelism.tensor_parallel_degree = options.tp
    dist.init_process_group("gloo")
    config.build().train()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=["megatron", "torchtitan"])
    parser.add_argument("--ep", type=int, default=2, help="ranks that share the experts")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share a layer's matrices")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of engines that miss their GPU
    torch.set_num_threads(1)
    {"megatron": megatron, "torchtitan": torchtitan}[options.engine](options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
