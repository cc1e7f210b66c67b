// Hadamard bases on CUDA: what the products of 16-bit tokens on tensor cores share. They read the columns of a group
// where these lie among those of x: with w = 8 columns, 16 bytes, that is what a copy to shared memory and a row of a
// matrix for the tensor cores have. Neighbouring groups are a block's, so that what it reads of a token is 32 bytes or
// more.
#pragma once

#include "cuda/hadamard.cuh"
#include "cuda/tensor_cores.cuh"

namespace randlora::cuda {

constexpr int kUnit = 8;               // elements, 16 bytes
constexpr int kTile = 32;              // tokens that a block has in shared memory at a time
constexpr int kInner = 256;            // elements of a token that it has, at most
constexpr int kTilesOfBlock = 4;       // at least, where there are as many: what a block begins and ends with is more
constexpr int kMultiprocessors = 132;  // of an H100

constexpr int padded(int x, int unit) { return (x + unit - 1) / unit * unit; }

// How many groups of `inner` elements a block takes.
inline int groups_of(const HadamardLayout& l, int inner) {
  int groups = 1;
  while (groups < 1 << l.log_R && 2 * groups * inner <= kInner) groups *= 2;
  return groups;
}

// A matrix in shared memory, a row of which is an even number of units. Where 8 rows, the first of them a multiple of
// 8, have one unit, these are in 32 banks.
template <class T>
struct Matrix {
  T* data;
  int units, shift, mask;

  __device__ __forceinline__ Matrix(T* data, int units) : data(data), units(units) {
    const int log = units % 8 == 0 ? 3 : units % 4 == 0 ? 2 : 1;
    shift = 3 - log, mask = (1 << log) - 1;
  }
  __device__ __forceinline__ T* at(int row, int unit) const {
    return data + (row * units + (unit ^ (row >> shift & mask))) * kUnit;
  }
};

// What a thread copies of each tile [groups, kTile, inner]: one unit of rows `row`, `row` + `step` ...
struct Copies {
  int row, step, group, unit;
  int64_t offset;  // within a token
  bool valid;      // or zeros
};

// Of x [tokens, m] if kColumns, of u [tokens, R, n_padded] otherwise, for groups from `first` on.
template <bool kColumns>
__device__ __forceinline__ Copies copies_of(const HadamardLayout& l, int first, int groups, int inner) {
  const int units = inner / kUnit, pieces = groups * units, piece = int(threadIdx.x) % pieces;
  Copies c;
  c.step = int(blockDim.x) / pieces, c.row = int(threadIdx.x) / pieces;
  if (c.row >= c.step) c.row = kTile;
  c.group = kColumns ? piece % groups : piece / units;
  c.unit = kColumns ? piece / groups : piece % units;
  const int64_t g = first + c.group;
  c.offset = kColumns ? ((int64_t(c.unit) << l.log_R) + g) * kUnit : g * l.n_padded + c.unit * kUnit;
  c.valid = kColumns ? c.offset < l.m : c.unit * kUnit < l.n_padded;
  return c;
}

template <class T>
__device__ __forceinline__ void begin_tile(const Copies& c, T* tile, int inner, const T* from, int64_t stride,
                                           int64_t first_token, int64_t tokens) {
  const Matrix<T> matrix(tile + c.group * kTile * inner, inner / kUnit);
  for (int row = c.row; row < kTile; row += c.step) {
    const int64_t token = first_token + row;
    const bool valid = c.valid && token < tokens;
    copy_later(matrix.at(row, c.unit), valid ? from + token * stride + c.offset : from, valid);
  }
}

}  // namespace randlora::cuda
