// Selections as Python gives them.

#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/module.h"
#include "cpu/selection.h"

namespace rpg {

// The selection of a weight with so many rows and columns, checked. Python keeps it for a layer.
class SelectionLists {
 public:
  using List = std::optional<std::vector<int32_t>>;
  using Shape = std::array<int64_t, 2>;

  SelectionLists(List rows, List columns, const Shape& shape)
      : rows_(std::move(rows)), columns_(std::move(columns)), shape_(shape) {
    require(!rows_ || ascends(*rows_, shape[0]), "rows: wanted ascending ones of the weight's");
    require(!columns_ || ascends(*columns_, shape[1]),
            "columns: wanted ascending ones of the weight's");
  }

  int64_t columns() const { return columns_ ? static_cast<int64_t>(columns_->size()) : shape_[1]; }
  int64_t all_columns() const { return shape_[1]; }

  Selection checked(int64_t rows, int64_t columns) const {
    require(shape_[0] == rows && shape_[1] == columns, "selection: that of another weight");
    Selection out{};
    if (rows_) out.rows = rows_->data(), out.row_count = static_cast<int64_t>(rows_->size());
    if (!columns_) return out;
    out.columns = columns_->data(), out.column_count = static_cast<int64_t>(columns_->size());
    return out;
  }

 private:
  static bool ascends(const std::vector<int32_t>& list, int64_t size) {
    int64_t least = 0;
    for (int32_t number : list) {
      if (number < least) return false;
      least = int64_t{number} + 1;
    }
    return !list.empty() && least <= size;
  }

  List rows_, columns_;
  Shape shape_;
};

}  // namespace rpg
