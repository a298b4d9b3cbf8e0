"""Data parallelism: one process per device, started by torchrun, with averaged gradients (torch.distributed).

    torchrun --nproc-per-node 8 run.py ...         # each process draws its own views, timesteps and noises

In a single process, started without torchrun, all of this does nothing.
"""
import contextlib
import os

import torch
import torch.distributed as dist

apart = []  # not empty within `alone`


def start(device):
    """Join the other processes of torchrun, if there are any; returns the device of this process.

    device: "cuda" becomes the CUDA device of this process. NCCL connects CUDA devices, gloo everything else.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device


def stop():
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not apart else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not apart else 1


@contextlib.contextmanager
def alone():
    """Context in which every process is on its own, as for processes that do different things."""
    apart.append(True)
    try:
        yield
    finally:
        apart.pop()


def streams(seed, count, device="cpu"):
    """A list of `count` random generators for this process.

    They are numbered through all processes, so that G processes with one stream each have the same generators as one
    process with G; the first one has the seed itself.
    """
    first = rank() * count
    return [torch.Generator(device).manual_seed((seed + 0x9E3779B97F4A7C15 * i) % 2 ** 63)
            for i in range(first, first + count)]


def shared(generator, seed):
    """A generator that draws the same in all processes: a new one of the seed; for a single process, the given one."""
    return generator if world() == 1 else torch.Generator(generator.device).manual_seed(seed)


def summed(value):
    """A tensor summed over the processes."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def average(loss, groups):
    """The mean [] of a loss [] over the processes; the gradients of all parameters in `groups` become means."""
    if world() == 1:
        return loss
    loss, parameters = loss.detach().clone(), [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # another process may have one
            parameter.grad = torch.zeros_like(parameter)
    for value in (loss, *(parameter.grad for parameter in parameters)):
        dist.all_reduce(value)
        value /= world()
    return loss


def largest(number, device="cpu"):
    """The maximum of a number over the processes: for flags, whether any of them is set."""
    if world() == 1:
        return number
    value = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def gathered(values):
    """The lists of all processes concatenated in the order of the processes."""
    if world() == 1:
        return values
    lists = [None] * world()
    dist.all_gather_object(lists, values)
    return [value for own in lists for value in own]
