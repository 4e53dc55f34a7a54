// What the two extension modules share: a launch function becomes a Python function that takes the
// fields of its structs, all of them, as keyword arguments.
//
// Pointers come as addresses, enums as the names of their values. A call allocates nothing; the
// names of its arguments are compared as pointers, with least effort in the order of the structs.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "llmkern.h"

namespace llmkern::bindings {

namespace py = pybind11;

inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> names;
  for (size_t first = 0, last; first < list.size(); first = last + 2) {
    last = std::min(list.find(", ", first), list.size());
    names.push_back(list.substr(first, last - first));
  }
  return names;
}

inline void check(bool done) {
  if (!done) throw py::error_already_set();
}

template <typename Enum>
Enum value_named(PyObject* name) {
  static const std::vector<std::string> names = split(value_names(Enum()));
  const char* given = PyUnicode_AsUTF8(name);
  check(given);
  for (size_t i = 0; i < names.size(); i++)
    if (names[i] == given) return Enum(i);
  throw py::value_error(std::string("got ") + given + ", expected one of " + value_names(Enum()));
}

template <typename T>
void load(PyObject* value, T& field) {
  if constexpr (std::is_enum_v<T>) {
    field = value_named<T>(value);
  } else if constexpr (std::is_pointer_v<T>) {
    void* const address = PyLong_AsVoidPtr(value);
    check(address || !PyErr_Occurred());
    field = static_cast<T>(address);
  } else if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(value);
    check(truth >= 0);
    field = truth;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    check(number != -1 || !PyErr_Occurred());
    field = number;
  } else {
    static_assert(std::is_integral_v<T> && std::is_signed_v<T>);
    const long long number = PyLong_AsLongLong(value);
    check(number != -1 || !PyErr_Occurred());
    if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max())
      throw py::value_error("got " + std::to_string(number) + ", which its field cannot hold");
    field = static_cast<T>(number);
  }
}

// visit(field) for the fields of a struct, or for a field itself.
template <typename T, typename Visit>
void visit_fields(T& params, const Visit& visit) {
  if constexpr (std::is_class_v<T>)
    std::apply([&](auto&... each) { (visit_fields(each, visit), ...); }, fields(params));
  else
    visit(params);
}

// The names of what visit_fields() visits.
template <typename T>
void append_names(T& params, const std::string& name, std::vector<std::string>& names) {
  if constexpr (std::is_class_v<T>) {
    const std::vector<std::string> inner = split(field_names(params));
    size_t i = 0;
    std::apply([&](auto&... each) { (append_names(each, inner[i++], names), ...); },
               fields(params));
  } else {
    names.push_back(name);
  }
}

// A launch function and the names of its arguments.
template <typename Result, typename... Structs>
class Function {
 public:
  using Launch = Result (*)(const Structs&...);

  Function(const char* name, Launch launch) : launch_(launch) {
    std::tuple<Structs...> params{};
    std::vector<std::string> names;
    std::apply([&](auto&... each) { (append_names(each, "", names), ...); }, params);
    if (names.size() > kMaxArguments) throw std::length_error(name);
    doc_ = std::string(name) + "(*";
    for (const std::string& each : names) {
      names_.push_back(PyUnicode_InternFromString(each.c_str()));
      check(names_.back());
      doc_ += ", " + each;
    }
    doc_ += ")\n--\n\n";  // so Python's inspect.signature() knows them
    const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call));
    method_ = {name, call, METH_FASTCALL | METH_KEYWORDS, doc_.c_str()};
  }

  PyMethodDef* method() { return &method_; }

 private:
  static constexpr size_t kMaxArguments = 40;
  using Arguments = std::array<PyObject*, kMaxArguments>;

  static PyObject* call(PyObject* capsule, PyObject* const* values, Py_ssize_t positional,
                        PyObject* keywords) {
    const auto& self = *static_cast<Function*>(PyCapsule_GetPointer(capsule, nullptr));
    try {
      return self.run(self.in_order(values, positional, keywords));
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  PyObject* run(const Arguments& arguments) const {
    std::tuple<Structs...> params{};
    size_t i = 0;
    const auto fill = [&](auto& field) { load(arguments[i++], field); };
    std::apply([&](auto&... each) { (visit_fields(each, fill), ...); }, params);
    if constexpr (std::is_void_v<Result>) {
      const py::gil_scoped_release unlocked;
      std::apply(launch_, params);
    } else {
      static_assert(std::is_same_v<Result, bool>);
      const bool result = [&] {
        const py::gil_scoped_release unlocked;
        return std::apply(launch_, params);
      }();
      return PyBool_FromLong(result);
    }
    return py::none().release().ptr();
  }

  // The arguments in the order of the fields.
  Arguments in_order(PyObject* const* values, Py_ssize_t positional, PyObject* keywords) const {
    const size_t count = keywords ? static_cast<size_t>(PyTuple_GET_SIZE(keywords)) : 0;
    if (positional || count != names_.size()) refuse(count + static_cast<size_t>(positional));
    Arguments arguments;
    for (size_t i = 0, hint = 0; i < count; i++) {
      const size_t place = find(PyTuple_GET_ITEM(keywords, i), hint);
      arguments[place] = values[i];  // Python gives no name twice, so all places are taken
      hint = place + 1;
    }
    return arguments;
  }

  size_t find(PyObject* name, size_t hint) const {
    const size_t count = names_.size();
    for (size_t i = 0; i < count; i++) {
      const size_t place = hint + i < count ? hint + i : hint + i - count;
      if (names_[place] == name) return place;
    }
    for (size_t place = 0; place < count; place++)  // a name that is not interned
      if (PyUnicode_Compare(names_[place], name) == 0) return place;
    throw py::type_error(std::string("got the argument ") + PyUnicode_AsUTF8(name) + ", expected " +
                         doc_.substr(0, doc_.find('\n')));
  }

  [[noreturn]] void refuse(size_t count) const {
    throw py::type_error("got " + std::to_string(count) +
                         " arguments, expected these, named: " + doc_.substr(0, doc_.find('\n')));
  }

  Launch launch_;
  std::vector<PyObject*> names_;  // interned and held for good
  std::string doc_;
  PyMethodDef method_;
};

// Makes `launch` the function `name` of the module. It releases the GIL while it runs.
template <typename Result, typename... Structs>
void def(py::module_& m, const char* name, Result (*launch)(const Structs&...)) {
  auto* const function = new Function<Result, Structs...>(name, launch);  // as long as the process
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(function, nullptr, nullptr));
  check(bool(capsule));
  const py::object owner = m.attr("__name__");
  m.attr(name) = py::reinterpret_steal<py::object>(
      PyCFunction_NewEx(function->method(), capsule.ptr(), owner.ptr()));
}

// DTYPES and LAYOUTS: what Python calls the values of the enums.
inline void export_enums(py::module_& m) {
  const auto names = [](const char* list) {
    py::list found;
    for (const std::string& name : split(list)) found.append(name);
    return py::tuple(found);
  };
  m.attr("DTYPES") = names(value_names(DType()));
  m.attr("LAYOUTS") = names(value_names(Layout()));
}

}  // namespace llmkern::bindings
