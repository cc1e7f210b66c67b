// The few lines of a test framework that these tests need: a failed check says where, what and with which values, and
// the program's exit status tells ctest.
#pragma once

#include <exception>
#include <iostream>
#include <sstream>
#include <string>

namespace check {

inline int failures = 0;

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// Counts every failure, prints the first twenty.
inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::cerr << file << ":" << line << ": " << what << "\n";
}

// Runs one test; an exception that escapes it is a failure.
template <class Test>
void run(const char* name, const Test& test) {
  const int before = failures;
  try {
    test();
  } catch (const std::exception& error) {
    fail(name, 0, text("unexpected exception: ", error.what()));
  }
  std::cout << (failures == before ? "ok      " : "FAILED  ") << name << std::endl;
}

// What a test program returns from main.
inline int finish() {
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures > 0 ? 1 : 0;
}

}  // namespace check

// CHECK_THAT(condition, values that explain a failure...)
#define CHECK_THAT(condition, ...) \
  if (!(condition)) check::fail(__FILE__, __LINE__, check::text(#condition " is false: ", __VA_ARGS__))
