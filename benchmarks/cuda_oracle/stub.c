/* Preloaded before libcudart: pretends that one GPU exists, whose compute capability is in ORACLE_SM (80, 90, ...).
 *
 * PyTorch may then ask what it likes of the device. Memory is taken from the host, for the one element with which
 * fake tensors wake the device up; whoever launches a kernel is told so and ended, since nothing would compute it.
 */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ANSWER(name, arguments, body) \
    cudaError_t name arguments { body; return cudaSuccess; }

static int capability(void) {
    const char *text = getenv("ORACLE_SM");
    return text ? atoi(text) : 80;
}

static cudaError_t refuse(const char *what) {
    fprintf(stderr, "stub.c: %s was called, but there is no GPU to do it\n", what);
    abort();
}

ANSWER(cudaGetDeviceCount, (int *count), *count = 1)
ANSWER(cudaGetDevice, (int *device), *device = 0)
ANSWER(cudaSetDevice, (int device), )
ANSWER(cudaDriverGetVersion, (int *version), *version = CUDART_VERSION)
ANSWER(cudaGetDeviceProperties, (struct cudaDeviceProp *it, int device), {
    memset(it, 0, sizeof *it);
    strcpy(it->name, "a GPU that does not exist");
    it->major = capability() / 10;
    it->minor = capability() % 10;
    it->totalGlobalMem = 80ull << 30;
    it->warpSize = 32;
    it->multiProcessorCount = 108;
    it->maxThreadsPerBlock = 1024;
    it->maxThreadsPerMultiProcessor = 2048;
    it->regsPerBlock = it->regsPerMultiprocessor = 65536;
    it->sharedMemPerBlock = 48 << 10;
    it->sharedMemPerBlockOptin = it->sharedMemPerMultiprocessor = 163 << 10;
})
ANSWER(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr name, int device), {
    *value = 0;
    if (name == cudaDevAttrComputeCapabilityMajor) *value = capability() / 10;
    if (name == cudaDevAttrComputeCapabilityMinor) *value = capability() % 10;
})
ANSWER(cudaDeviceCanAccessPeer, (int *can, int device, int peer), *can = 0)
ANSWER(cudaGetDriverEntryPointByVersion,
       (const char *name, void **found, unsigned version, unsigned long long flags,
        enum cudaDriverEntryPointQueryResult *status),
       { *found = NULL; *status = cudaDriverEntryPointSymbolNotFound; })
ANSWER(cudaMemGetInfo, (size_t *free, size_t *total), *free = *total = 80ull << 30)
ANSWER(cudaDeviceSynchronize, (void), )
ANSWER(cudaGetLastError, (void), )
ANSWER(cudaPeekAtLastError, (void), )

ANSWER(cudaMalloc, (void **memory, size_t bytes), *memory = aligned_alloc(512, (bytes + 511) / 512 * 512))
ANSWER(cudaFree, (void *memory), free(memory))

ANSWER(cudaMemcpyAsync, (void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream),
       memcpy(to, from, bytes))

ANSWER(cudaDeviceGetStreamPriorityRange, (int *least, int *greatest), { *least = 0; *greatest = -5; })
ANSWER(cudaStreamCreateWithPriority, (cudaStream_t *made, unsigned flags, int priority), *made = malloc(1))
ANSWER(cudaStreamDestroy, (cudaStream_t stream), )
ANSWER(cudaStreamQuery, (cudaStream_t stream), )
ANSWER(cudaStreamSynchronize, (cudaStream_t stream), )
ANSWER(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags), )
ANSWER(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus *status),
       *status = cudaStreamCaptureStatusNone)
ANSWER(cudaStreamGetCaptureInfo,
       (cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
        const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count),
       *status = cudaStreamCaptureStatusNone)
ANSWER(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode *mode), )
ANSWER(cudaEventCreateWithFlags, (cudaEvent_t *made, unsigned flags), *made = malloc(1))
ANSWER(cudaEventDestroy, (cudaEvent_t event), )
ANSWER(cudaEventRecord, (cudaEvent_t event, cudaStream_t stream), )
ANSWER(cudaEventRecordWithFlags, (cudaEvent_t event, cudaStream_t stream, unsigned flags), )
ANSWER(cudaEventQuery, (cudaEvent_t event), )
ANSWER(cudaEventSynchronize, (cudaEvent_t event), )
ANSWER(cudaEventElapsedTime, (float *ms, cudaEvent_t begin, cudaEvent_t end), *ms = 1)

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    return refuse("cudaLaunchKernel");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **arguments) {
    return refuse("cudaLaunchKernelExC");
}
