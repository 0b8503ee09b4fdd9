// The C interface of the worker's shim over libtorch.
//
// Why a shim: the Rust bindings hide a loaded module's signature, its attributes and its methods,
// and Cresset needs all three (to bind arguments by name, to copy a stateful module per sequence,
// to move a sequence's state between workers). What is absent: policy. Which configuration input
// feeds which argument, what a message should say, when to run what, is decided in Rust.
//
// Rules of this interface:
// - no C++ exception leaves a function: each fallible function returns a CRST_* code and, when that
//   is not CRST_OK, fills `error` with a text that the caller frees with crst_free;
// - pointers given in are borrowed for the call only; handles given out are freed by their *_free;
// - a handle may move between threads, but is used by one thread at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CRST_OK = 0,
  CRST_FAILED = 1,          // libtorch refused; the text is what it said, whole
  CRST_OUT_OF_MEMORY = 2,
  CRST_RAISED = 3,          // the module itself raised; the text is "Class: message" or a message
  CRST_NOT_CHECKPOINTABLE = 4,
  CRST_BAD_CHECKPOINT = 5,
  CRST_BAD_INPUT = 6,       // the bytes of an input don't fit; the text names it
};

typedef struct crst_error {
  char* text;
  size_t length;
} crst_error;

typedef struct crst_slice {
  const uint8_t* data;
  size_t length;
} crst_slice;

// A loaded module that has never run, and the copy of it that answers stateless requests.
typedef struct crst_module crst_module;
// A copy of a module with a state of its own; the weights are those of its crst_module.
typedef struct crst_sequence crst_sequence;
// The responses to one request of a decoupled model, from a copy of the module of its own.
typedef struct crst_generation crst_generation;
// A model that was compiled to native code by AOTInductor.
typedef struct crst_package crst_package;
// A call of a module on a GPU, under way.
typedef struct crst_staged crst_staged;
// What a call returned, in order.
typedef struct crst_results crst_results;
// One returned tensor, kept alive while its bytes are in use.
typedef struct crst_tensor crst_tensor;

// Where an argument's value comes from.
enum {
  CRST_ARG_INPUT = 0,    // the input number `integer`: a tensor, or List[str] if it is of byte strings
  CRST_ARG_DEFAULT = 1,  // the default in the module's signature
  CRST_ARG_INT = 2,
  CRST_ARG_FLOAT = 3,
  CRST_ARG_BOOL = 4,
  CRST_ARG_TEXT = 5,
  CRST_ARG_DICT = 6,     // all input tensors, as Dict[str, Tensor]
};

typedef struct crst_argument {
  int32_t kind;
  int64_t integer;
  double real;
  crst_slice text;
} crst_argument;

// The type of an input's or a result's elements: a c10::ScalarType, or one of these.
enum {
  CRST_TYPE_NONE = -1,   // a value that can't be answered
  CRST_TYPE_ABSENT = -3,  // an optional input that a call leaves out
  CRST_TYPE_BYTES = -2,  // byte strings, in the wire's framing: u32 length, little endian, then the bytes
};

typedef struct crst_input {
  int32_t type;
  const int64_t* shape;
  size_t rank;
  const crst_slice* parts;  // laid one after the other they are the whole input, row-major
  size_t part_count;
} crst_input;

typedef struct crst_view {
  int32_t type;
  const int64_t* shape;
  size_t rank;
  const uint8_t* data;
  size_t length;
  crst_slice name;  // the key in a dict, or empty; for CRST_TYPE_NONE the type's name
} crst_view;

void crst_free(char* text);

// Threads of the whole process; `inter` can be set once only, later values are ignored.
int32_t crst_set_threads(int32_t intra, int32_t inter, crst_error* error);

// Threads inside one operation for what the calling thread runs.
int32_t crst_set_intra_op_threads(int32_t intra, crst_error* error);

// From now on large blocks of freed tensors are kept for new ones, up to 512 MiB and for 10 s without use.
int32_t crst_keep_memory(crst_error* error);

// Gives what is kept of freed memory, here and by malloc, back to the system.
void crst_give_memory_back(void);

// Opens libtorch_cuda.so. It has to come before anything else that asks libtorch for a GPU.
int32_t crst_cuda_load(const char* path, int32_t* devices, crst_error* error);
int32_t crst_cuda_memory(int32_t ordinal, uint64_t* free_bytes, uint64_t* total_bytes, crst_error* error);

// `cuda` is the ordinal of the GPU, or -1 for the CPU.
int32_t crst_module_load(const char* path, int32_t cuda, crst_module** out, crst_error* error);
// Another module with the same parameters and arguments, and buffers and attributes of its own; each may run on a thread of its
// own. Refused if the module was seen to write to its parameters; from here on both are refused a call that does.
int32_t crst_module_twin(crst_module* module, crst_module** out, crst_error* error);
void crst_module_free(crst_module* module);
// One line per argument of forward, "arg\tNAME\tKIND\tTYPE\tHAS_DEFAULT" with a KIND of
// tensor|texts|int|float|bool|str|dict|other and HAS_DEFAULT of 0|1; then "ret\t\t\tTYPE\t0".
int32_t crst_module_signature(crst_module* module, char** text, size_t* length, crst_error* error);
// Says where each argument of forward comes from, in the signature's order; `names` are those of the
// inputs, the keys for CRST_ARG_DICT.
int32_t crst_module_bind(crst_module* module, const crst_argument* arguments, size_t count,
                         const crst_slice* names, size_t name_count, crst_error* error);
uint64_t crst_module_bytes(const crst_module* module);
// A hash of the names and types of all attributes: two modules with the same one can exchange checkpoints.
uint64_t crst_module_fingerprint(const crst_module* module);
int32_t crst_module_forward(crst_module* module, const crst_input* inputs, size_t count,
                            crst_results** out, crst_error* error);

// A call on a GPU, in three parts, so that the copies of one call can be made while another computes:
// Another handle on the very same instance, with a stream of its own for copies. Of all handles of an instance only one at a
// time may be in crst_module_compute; that is the caller's business.
int32_t crst_module_second(crst_module* module, crst_module** out, crst_error* error);
// Lays the inputs into pinned memory and has them copied to the GPU.
int32_t crst_module_stage(crst_module* module, const crst_input* inputs, size_t count, crst_staged** out, crst_error* error);
// Runs forward on what was staged, with this handle or another of the instance, and waits for the GPU.
int32_t crst_module_compute(crst_module* module, crst_staged* staged, crst_error* error);
// Copies what forward returned to pinned memory, waits for that, and hands it out. To be called once, after crst_module_compute.
int32_t crst_staged_results(crst_staged* staged, crst_results** out, crst_error* error);
void crst_staged_free(crst_staged* staged);

int32_t crst_sequence_open(crst_module* module, crst_sequence** out, crst_error* error);
void crst_sequence_free(crst_sequence* sequence);
int32_t crst_sequence_step(crst_sequence* sequence, const crst_input* inputs, size_t count,
                           crst_results** out, crst_error* error);
int32_t crst_sequence_checkpoint(crst_sequence* sequence, char** data, size_t* length, crst_error* error);
// All or nothing: after an error the sequence is as it was.
int32_t crst_sequence_restore(crst_sequence* sequence, const uint8_t* data, size_t length, crst_error* error);

// Whether the module can answer a request more or less often than once: it has a method `next` without
// arguments that returns an Optional.
int32_t crst_module_check_next(crst_module* module, crst_error* error);
// Calls forward, whose result is ignored; the times are those of its inputs and of itself.
int32_t crst_generation_open(crst_module* module, const crst_input* inputs, size_t count, crst_generation** out,
                             uint64_t* input_ns, uint64_t* infer_ns, crst_error* error);
void crst_generation_free(crst_generation* generation);
// The next response; null after the last.
int32_t crst_generation_next(crst_generation* generation, crst_results** out, crst_error* error);

int32_t crst_package_load(const char* path, int32_t cuda, crst_package** out, crst_error* error);
// What was returned before stays good: it keeps what it needs.
void crst_package_free(crst_package* package);
// Two lines: the inputs and the outputs as torch's tree specifications in JSON.
int32_t crst_package_call_spec(crst_package* package, char** text, size_t* length, crst_error* error);
// The names of the inputs, one for each tensor that the package takes: it doesn't count them itself.
int32_t crst_package_bind(crst_package* package, const crst_slice* names, size_t count, crst_error* error);
uint64_t crst_package_bytes(const crst_package* package);
int32_t crst_package_run(crst_package* package, const crst_input* inputs, size_t count, crst_results** out,
                         crst_error* error);

size_t crst_results_count(const crst_results* results);
// How long the inputs took to become tensors on the device, and how long the module ran.
void crst_results_times(const crst_results* results, uint64_t* input_ns, uint64_t* infer_ns);
void crst_results_view(const crst_results* results, size_t index, crst_view* view);
// The tensor of `index`, whose data pointer stays the one that the view gave.
crst_tensor* crst_results_take(crst_results* results, size_t index);
void crst_results_free(crst_results* results);
void crst_tensor_free(crst_tensor* tensor);

// For tests only: writes a module made of TorchScript source. Each attribute is a name, a type and
// an expression, all in TorchScript; `parameters` marks those (tensors) that are weights.
int32_t crst_testing_save(const char* source, const crst_slice* attributes, const uint8_t* parameters,
                          size_t attribute_count, const char* path, crst_error* error);

#ifdef __cplusplus
}
#endif
