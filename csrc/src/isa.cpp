// CPUID and, for the tiles, the kernel's permission. See isa.h.
#include "penstock/isa.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace penstock {

std::string_view isa_name(Isa isa) {
    switch (isa) {
        case Isa::scalar: return "scalar";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::amx_emulated: return "amx_emulated";
        case Isa::amx: return "amx";
    }
    return "unknown";
}

#if defined(__x86_64__)

namespace {

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// CPUID leaf 7: EDX bit 22 bf16 tiles, 24 tiles, 25 int8 tiles (Intel SDM, volume 2A, CPUID).
bool cpu_has_tiles() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned wanted = (1u << 22) | (1u << 24) | (1u << 25);
    return (edx & wanted) == wanted;
}

// Linux gives a process the tiles' register state only when it asks (Documentation/arch/x86/xstate).
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

std::vector<Isa> supported_isas() {
    std::vector<Isa> isas{Isa::scalar};
    __builtin_cpu_init();
    if (has_avx2()) isas.push_back(Isa::avx2);
    if (!has_avx512()) return isas;
    isas.push_back(Isa::avx512);
    isas.push_back(Isa::amx_emulated);
    if (cpu_has_tiles() && may_use_tiles()) isas.push_back(Isa::amx);
    return isas;
}

#else

std::vector<Isa> supported_isas() { return {Isa::scalar}; }

#endif

Isa isa_named(std::string_view name) {
    for (Isa isa : supported_isas()) {
        if (isa_name(isa) == name) return isa;
    }
    throw std::invalid_argument("this CPU has no instruction set named " + std::string(name));
}

}  // namespace penstock
