// The native engine as Python sees it: plain pointers and integers, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/dense.h"
#include "cpu/few_rows.h"
#include "cpu/moments.h"
#include "cpu/pages.h"
#include "cpu/step.h"

namespace py = pybind11;
using namespace hk;

namespace {

// (pointer, strides in elements); (0, ()) where there is none.
using View = std::pair<uintptr_t, std::vector<int64_t>>;

Tensor tensor(const View& view) {
    Tensor tensor;
    tensor.data = reinterpret_cast<char*>(view.first);
    std::copy_n(view.second.begin(), std::min(view.second.size(), tensor.stride.size()), tensor.stride.begin());
    return tensor;
}

template <size_t n, class T>
std::array<T, n> array(const std::vector<T>& values, const char* name) {
    if (values.size() != n) throw py::value_error(std::string(name) + ": wanted " + std::to_string(n) + " numbers");
    std::array<T, n> array;
    std::copy(values.begin(), values.end(), array.begin());
    return array;
}

Rows rows_of(int64_t count, int64_t contexts, int64_t tokens, uintptr_t entries, uintptr_t starts) {
    return {count, contexts, tokens, reinterpret_cast<const int64_t*>(entries),
            reinterpret_cast<const int64_t*>(starts)};
}

const InstructionSet& chosen(const std::string& isa) {
    const InstructionSet* set = instruction_set(isa.empty() ? nullptr : isa.c_str());
    if (!set) throw py::value_error("isa: got '" + isa + "', wanted one of instruction_sets()");
    return *set;
}

Step step(std::vector<int64_t> extent, std::vector<int64_t> block, int64_t out_features, int64_t in_features,
          int64_t contexts, int64_t rows_per_context, bool per_chunk_heads, bool head_bias, int activation, int storage,
          std::vector<int> forms, std::vector<int> outputs, int split, bool aligned, int threads,
          size_t prepare_bytes, const std::string& isa) {
    Shape shape{array<label_count>(extent, "extent"), array<label_count>(block, "block"), out_features, in_features,
                contexts, rows_per_context, per_chunk_heads, static_cast<Activation>(activation),
                static_cast<Storage>(storage), head_bias};
    auto want = [](bool good, const char* what) {
        if (!good) throw py::value_error(what);
    };
    for (int l = 0; l < label_count; ++l)
        want(shape.extent[l] > 0 && shape.block[l] > 0, "extent, block: wanted positive numbers");
    want(threads > 0 && contexts > 0 && split >= 0 && split < label_count, "threads, contexts, split: out of range");
    want(activation >= -1 && activation <= static_cast<int>(Activation::sin), "activation: out of range");
    want(storage >= 0 && storage <= static_cast<int>(Storage::bf16), "storage: out of range");
    want(forms.size() == 2 && forms[0] != forms[1] && !outputs.empty(), "forms, outputs: wanted two slots, and some");
    for (const auto& slots : {forms, outputs})
        for (int slot : slots) want(slot >= Y && slot <= X, "forms, outputs: wanted slots");
    want(!head_bias || (outputs[0] == Y && shape.storage != Storage::bf16), "head_bias: of y, in fp32 or fp64");
    for (int slot : outputs) want(slot != forms[0] && slot != forms[1], "outputs: one is formed from");
    return Step(shape, array<2>(forms, "forms"), outputs, split, aligned, threads, prepare_bytes, chosen(isa));
}

void run(const Step& step, const std::vector<View>& factors, const View& chunks, const std::vector<uintptr_t>& outputs,
         int64_t count, int64_t contexts, int64_t tokens, uintptr_t entries, uintptr_t starts, uintptr_t workspace,
         uintptr_t head_bias) {
    Arguments arguments;
    for (int slot = 0; slot < FORMED; ++slot) arguments.factors[slot] = tensor(factors.at(slot));
    arguments.chunks = tensor(chunks);
    for (uintptr_t output : outputs) arguments.outputs.push_back(tensor({output, {}}));
    arguments.rows = rows_of(count, contexts, tokens, entries, starts);
    arguments.workspace = reinterpret_cast<char*>(workspace);
    arguments.head_bias = reinterpret_cast<char*>(head_bias);
    py::gil_scoped_release unlocked;
    step.run(arguments);
}

FewRows few_rows(std::vector<int64_t> extent, int64_t out_features, int64_t in_features, int storage, int threads,
                 const std::string& isa) {
    Shape shape{array<label_count>(extent, "extent"), {}, out_features, in_features};
    shape.storage = static_cast<Storage>(storage);
    bool good = threads > 0 && (shape.storage == Storage::f32 || shape.storage == Storage::f64);
    for (int64_t n : shape.extent) good = good && n > 0;
    if (!good) throw py::value_error("extent, threads: wanted positive numbers; storage: fp32 or fp64");
    return FewRows(shape, threads, chosen(isa));
}

Moments moments(int64_t contexts, int64_t chunks, int64_t width, int activation, int storage, int threads,
                const std::string& isa) {
    const InstructionSet& set = chosen(isa);
    bool wide = static_cast<Storage>(storage) == Storage::f64;
    if (!(wide || static_cast<Storage>(storage) == Storage::f32) || width % (wide ? set.f64 : set.f32)->lanes)
        throw py::value_error("width: wanted whole vectors; storage: fp32 or fp64");
    if (contexts < 1 || chunks < 1 || threads < 1) throw py::value_error("contexts, chunks, threads: wanted some");
    return Moments(contexts, chunks, width, static_cast<Activation>(activation), static_cast<Storage>(storage), threads,
                   set);
}

// (context, chunks, scale) of each
std::vector<HiddenLayer> hidden_layers(const std::vector<std::array<uintptr_t, 3>>& given) {
    std::vector<HiddenLayer> layers;
    for (auto [context, chunks, scale] : given)
        layers.push_back({reinterpret_cast<char*>(context), reinterpret_cast<char*>(chunks), reinterpret_cast<char*>(scale)});
    return layers;
}

// Multiplications and additions per second of one thread whose operands never leave its registers.
double peak_flops_per_s(const std::string& isa, int64_t vectors) {
    const Kernels& kernels = *chosen(isa).f32;
    py::gil_scoped_release unlocked;
    auto start = std::chrono::steady_clock::now();
    volatile double kept = kernels.spin(vectors);
    (void)kept;
    return 2.0 * vectors * kernels.lanes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "The native CPU engine; hyperkernels.backends.native_cpu is its caller.";
    module.def("instruction_sets", [] {
        const char* names[max_instruction_sets];
        return std::vector<std::string>(names, names + instruction_sets(names));
    });
    module.def("peak_flops_per_s", &peak_flops_per_s, py::arg("isa") = "", py::arg("vectors") = int64_t(100'000'000),
               "the ceiling of one thread in fp32");
    module.def("ask_for_large_pages", [](uintptr_t data, size_t bytes) {
        ask_for_large_pages(reinterpret_cast<char*>(data), bytes);
    }, py::arg("data"), py::arg("bytes"));
    py::class_<Dense>(module, "Dense", "a dense fp32 layer by the engine's own tiles, its weight packed once")
        .def(py::init([](uintptr_t weight, int64_t outputs, int64_t inputs) {
                 return Dense(reinterpret_cast<const float*>(weight), outputs, inputs, chosen(""));
             }), py::arg("weight"), py::arg("outputs"), py::arg("inputs"))
        .def("run", [](const Dense& dense, uintptr_t x, int64_t rows, uintptr_t y, int threads) {
            py::gil_scoped_release unlocked;
            dense.run(reinterpret_cast<const float*>(x), rows, reinterpret_cast<float*>(y), threads);
        }, py::arg("x"), py::arg("rows"), py::arg("y"), py::arg("threads"));
    py::class_<Step>(module, "Step")
        .def(py::init(&step), py::kw_only(), py::arg("extent"), py::arg("block"), py::arg("out_features"),
             py::arg("in_features"), py::arg("contexts"), py::arg("rows_per_context"), py::arg("per_chunk_heads"),
             py::arg("head_bias"), py::arg("activation"), py::arg("storage"), py::arg("forms"), py::arg("outputs"),
             py::arg("split"), py::arg("aligned"), py::arg("threads"), py::arg("prepare_bytes"), py::arg("isa"))
        .def("block_bytes", &Step::block_bytes)
        .def("workspace_bytes",
             [](const Step& step, int64_t count, int64_t contexts, int64_t tokens) {
                 return step.workspace_bytes(rows_of(count, contexts, tokens, 0, 0));
             })
        .def_property_readonly("threads", &Step::threads)
        .def("work", &Step::work, "multiplications of a vector, all threads together")
        .def("run", &run);
    py::class_<FewRows>(module, "FewRows")
        .def(py::init(&few_rows), py::kw_only(), py::arg("extent"), py::arg("out_features"), py::arg("in_features"),
             py::arg("storage"), py::arg("threads"), py::arg("isa"))
        .def("workspace_bytes", &FewRows::workspace_bytes)
        .def_property_readonly("threads", &FewRows::threads)
        .def("work", &FewRows::work, "as Step.work")
        .def("run", [](const FewRows& few, uintptr_t x, uintptr_t hidden, uintptr_t head, uintptr_t bias, uintptr_t y,
                       int64_t rows, uintptr_t workspace) {
            auto at = [](uintptr_t address) { return reinterpret_cast<char*>(address); };
            py::gil_scoped_release unlocked;
            few.run(at(x), at(hidden), at(head), at(bias), at(y), rows, at(workspace));
        });
    py::class_<Moments>(module, "Moments")
        .def(py::init(&moments), py::kw_only(), py::arg("contexts"), py::arg("chunks"), py::arg("width"),
             py::arg("activation"), py::arg("storage"), py::arg("threads"), py::arg("isa"))
        .def_property_readonly("slices", &Moments::slices)
        .def_property_readonly("threads", &Moments::threads)
        .def("run", [](const Moments& moments, const std::vector<std::array<uintptr_t, 3>>& layers, uintptr_t sums) {
            auto given = hidden_layers(layers);
            py::gil_scoped_release unlocked;
            moments.run(given, reinterpret_cast<char*>(sums));
        })
        .def("pull_back", [](const Moments& moments, const std::vector<std::array<uintptr_t, 3>>& layers, uintptr_t sides,
                             const std::vector<std::array<uintptr_t, 2>>& sums) {
            auto given = hidden_layers(layers);
            std::vector<LayerSums> to;
            for (auto [dcontext, dchunks] : sums)
                to.push_back({reinterpret_cast<char*>(dcontext), reinterpret_cast<char*>(dchunks)});
            py::gil_scoped_release unlocked;
            moments.pull_back(given, reinterpret_cast<char*>(sides), to);
        });
}
