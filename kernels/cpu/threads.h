// The threads of a loop are torch's OpenMP threads, or one thread if the compiler has no OpenMP.
#pragma once

#include <algorithm>
#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
static inline int max_threads() { return omp_get_max_threads(); }
#else
static inline int max_threads() { return 1; }
#endif

static inline int team(size_t items) { return (int)std::clamp<size_t>(items, 1, max_threads()); }
