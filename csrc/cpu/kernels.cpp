// The kernels of one instruction set: compiled once for each, with PYCKPT_ISA its name.
//
// Nothing of the C++ library's templates is used in here: the linker keeps one copy of a template for all, and must not
// choose one that was compiled for instructions that another machine lacks.

#include "backward.h"
#include "forward.h"

#define PYCKPT_NAME_OF(isa) #isa
#define PYCKPT_STRING(isa) PYCKPT_NAME_OF(isa)
#define PYCKPT_JOINED(a, b) a##b
#define PYCKPT_JOIN(a, b) PYCKPT_JOINED(a, b)

namespace pyckpt {

extern const Kernels PYCKPT_JOIN(kernels_, PYCKPT_ISA);
const Kernels PYCKPT_JOIN(kernels_, PYCKPT_ISA) = {
    PYCKPT_STRING(PYCKPT_ISA),   PYCKPT_ISA::forward_scratch, PYCKPT_ISA::forward,
    PYCKPT_ISA::backward_scratch, PYCKPT_ISA::backward,
};

}  // namespace pyckpt
