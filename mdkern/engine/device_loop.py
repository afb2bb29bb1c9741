"""Runs a whole segment of step-by-step decoding in one launch: the step's graph inside a WHILE node of a CUDA graph.

The number of steps of a decoder that looks at the model depends on data on the device. With conditional nodes (CUDA
12.4 and later) the device itself decides whether to run another step, so the host takes no part and no step is run
needlessly. The node and its condition (``csrc/loop_condition.cu``, shipped as PTX, which the driver compiles) are made
through NVIDIA's `cuda.bindings`, which PyTorch's CUDA builds depend on. Where they are missing, or the driver is too
old, the caller replays the step's graph instead.
"""

from __future__ import annotations

import ctypes
import logging
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PTX = Path(__file__).with_name("loop_condition.ptx")
POLL_SECONDS = 5e-4


class DeviceLoop:
    """A captured step that runs until ``status[0]`` is 0."""

    def __init__(self, step: torch.cuda.CUDAGraph, status: Tensor) -> None:
        """Build and instantiate the graph.

        Args:
            step: captured with ``keep_graph=True``; it must live as long as this object.
            status: int64 on the device; each step sets its first entry to the number of slots that still have work.

        Raises:
            RuntimeError: the driver refused.
        """
        from cuda.bindings import driver

        self.stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        function = load_condition(status.device)
        context = check(driver.cuCtxGetCurrent())
        graph = check(driver.cuGraphCreate(0))
        try:
            always = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
            handle = check(driver.cuGraphConditionalHandleCreate(graph, context, 1, always))
            node = driver.CUgraphNodeParams()
            node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
            node.conditional.handle = handle
            node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
            node.conditional.size = 1
            node.conditional.ctx = context
            check(driver.cuGraphAddNode(graph, None, None, 0, node))
            body = node.conditional.phGraph_out[0]
            child = driver.CUgraph(init_value=step.raw_cuda_graph())
            first = check(driver.cuGraphAddChildGraphNode(body, None, 0, child))
            addresses = status.data_ptr(), self.stop.data_ptr()
            values = (ctypes.c_ulonglong(int(handle)), *(ctypes.c_void_p(address) for address in addresses))
            pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
            launch = driver.CUDA_KERNEL_NODE_PARAMS()
            launch.func = function
            for name in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"):
                setattr(launch, name, 1)
            launch.sharedMemBytes = 0
            launch.kernelParams = ctypes.addressof(pointers)
            check(driver.cuGraphAddKernelNode(body, [first], 1, launch))
            self.executable = check(driver.cuGraphInstantiate(graph, 0))
        finally:
            check(driver.cuGraphDestroy(graph))
        self.device = status.device
        weakref.finalize(self, driver.cuGraphExecDestroy, self.executable)

    def run(self, watch: Callable[[], None]) -> None:
        """Launch it on the current stream and wait for its end, calling `watch` now and then.

        An exception meanwhile, such as Ctrl-C, ends the loop after the current step.
        """
        from cuda.bindings import driver

        self.stop[0] = 0
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            check(driver.cuGraphLaunch(self.executable, driver.CUstream(init_value=stream.cuda_stream)))
            done = torch.cuda.Event()
            done.record(stream)
            try:
                while not done.query():
                    watch()
                    time.sleep(POLL_SECONDS)
            except BaseException:
                self.stop[0] = 1
                done.synchronize()
                raise


def make_loop(step: torch.cuda.CUDAGraph, status: Tensor) -> DeviceLoop | None:
    """A `DeviceLoop`, or None where this machine can't have one; the log says why."""
    try:
        return DeviceLoop(step, status)
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.info("no device-side loop, steps are replayed one by one: %s", error)
        return None


@cache
def load_condition(device: torch.device) -> Any:
    """The kernel that sets the loop's condition, compiled by the driver for a device."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that there is a context
        module = check(driver.cuModuleLoadData(PTX.read_bytes() + b"\0"))
        return check(driver.cuModuleGetFunction(module, b"loop_condition"))


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call.

    Raises:
        RuntimeError: the call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None
