"""One run on several devices: a process each, started by torchrun, their gradients averaged (torch.distributed).

    torchrun --nproc-per-node 8 run.py ...         # each process draws its own views, timesteps and noises

A single process, started without torchrun, is the first of one, and nothing here does anything.
"""
import contextlib
import os

import torch
import torch.distributed as dist

apart = []  # not empty: every process works for itself


def start(device):
    """Join the other processes of torchrun, if there are any -> the device of this one.

    device: "cuda" becomes this process's own of the machine's. NCCL joins CUDA devices, gloo everything else.
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
    """Leave the other processes; nothing where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not apart else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not apart else 1


@contextlib.contextmanager
def alone():
    """Within it every process is the first of one: nothing is shared. Processes do different things there."""
    apart.append(True)
    try:
        yield
    finally:
        apart.pop()


def streams(seed, count, device="cpu"):
    """`count` random generators of this process, a list. Through all processes their numbers go on, so that G processes
    with one stream each have those of one process with G; the very first is that of the seed itself."""
    first = rank() * count
    return [torch.Generator(device).manual_seed((seed + 0x9E3779B97F4A7C15 * i) % 2 ** 63)
            for i in range(first, first + count)]


def shared(generator, seed):
    """A generator that draws the same in all processes: that of a single one itself, else a new one of the seed."""
    return generator if world() == 1 else torch.Generator(generator.device).manual_seed(seed)


def summed(value):
    """A tensor summed over the processes."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def average(loss, groups):
    """The mean [] of a loss [] over the processes; the gradients of all parameters of an optimiser's groups become
    their means."""
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
    """The largest of the processes' numbers: of flags, whether any of them is set."""
    if world() == 1:
        return number
    value = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def gathered(values):
    """The lists of all processes as one, in their order; on the CPU."""
    if world() == 1:
        return values
    lists = [None] * world()
    dist.all_gather_object(lists, values)
    return [value for own in lists for value in own]
