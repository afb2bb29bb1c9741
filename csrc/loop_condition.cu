// The condition of a WHILE node of a CUDA graph: another turn as long as slots have work and nobody asked to stop.
//
// mdkern/loop_condition.ptx is this file through `make csrc`, which needs nvcc; users need no compiler, the driver does
// the rest.

extern "C" __global__ void loop_condition(cudaGraphConditionalHandle loop, const long long *status,
                                          const volatile int *stop) {
  cudaGraphSetConditional(loop, status[0] != 0 && *stop == 0);  // `stop` is memory of the host
}
