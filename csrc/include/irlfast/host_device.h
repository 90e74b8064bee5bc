// What a function needs so that the host's compiler and a GPU's both take it.
#pragma once

#if defined(__CUDACC__)
#define IRLFAST_HOST_DEVICE __host__ __device__
#define IRLFAST_INLINE __host__ __device__ __forceinline__
#else
#define IRLFAST_HOST_DEVICE
#define IRLFAST_INLINE inline __attribute__((always_inline))
#endif
