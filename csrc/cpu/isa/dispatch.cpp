#include "irlfast/isa.h"
#include "isa/importance_spans.h"
#include "isa/pair_spans.h"
#include "isa/policy_spans.h"
#include "isa/sequence_spans.h"
#include "isa/softmax_spans.h"

namespace irlfast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> built_isas() {
  std::vector<Isa> isas{Isa::kBaseline};
#ifdef IRLFAST_HAVE_AVX2
  isas.push_back(Isa::kAvx2);
#endif
#ifdef IRLFAST_HAVE_AVX512
  isas.push_back(Isa::kAvx512);
#endif
#ifdef IRLFAST_HAVE_AVX512_BF16
  isas.push_back(Isa::kAvx512Bf16);
#endif
  return isas;
}

bool isa_runs_here(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return true;
    // __builtin_cpu_supports reads XCR0 as well as cpuid, so a kernel that does not save the wide registers says no.
    case Isa::kAvx2:
#ifdef IRLFAST_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::kAvx512:
#ifdef IRLFAST_HAVE_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::kAvx512Bf16:
#ifdef IRLFAST_HAVE_AVX512_BF16
      return isa_runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
  return false;
}

Isa best_isa() {
  static const Isa best = isa_runs_here(Isa::kAvx512Bf16) ? Isa::kAvx512Bf16
                          : isa_runs_here(Isa::kAvx512)   ? Isa::kAvx512
                          : isa_runs_here(Isa::kAvx2)     ? Isa::kAvx2
                                                          : Isa::kBaseline;
  return best;
}

// NAME(isa): the copy of a table of spans that was compiled for an instruction set.
#ifdef IRLFAST_HAVE_AVX512_BF16
#define IRLFAST_CASE_AVX512_BF16(name) \
  case Isa::kAvx512Bf16:               \
    return name##_avx512_bf16();
#else
#define IRLFAST_CASE_AVX512_BF16(name)
#endif
#ifdef IRLFAST_HAVE_AVX512
#define IRLFAST_CASE_AVX512(name) \
  case Isa::kAvx512:              \
    return name##_avx512();
#else
#define IRLFAST_CASE_AVX512(name)
#endif
#ifdef IRLFAST_HAVE_AVX2
#define IRLFAST_CASE_AVX2(name) \
  case Isa::kAvx2:              \
    return name##_avx2();
#else
#define IRLFAST_CASE_AVX2(name)
#endif
#define IRLFAST_DISPATCH(Table, name) \
  const Table& name(Isa isa) {        \
    switch (isa) {                    \
      IRLFAST_CASE_AVX512_BF16(name)  \
      IRLFAST_CASE_AVX512(name)       \
      IRLFAST_CASE_AVX2(name)         \
      default:                        \
        return name##_baseline();     \
    }                                 \
  }

IRLFAST_DISPATCH(SoftmaxSpans, softmax_spans)
IRLFAST_DISPATCH(PolicySpans, policy_spans)
IRLFAST_DISPATCH(SequenceSpans, sequence_spans)
IRLFAST_DISPATCH(PairSpans, pair_spans)
IRLFAST_DISPATCH(ImportanceSpans, importance_spans)

}  // namespace irlfast
