// Which rows and columns of a weight a call is about.

#pragma once

#include <cstdint>

namespace rpg {

// Lists of rows and of columns (in-channels) in ascending order, each once; null: all of them. x
// and dx have the chosen columns alone, y, dy and the bias the chosen rows.
struct Selection {
  const int32_t* rows;
  int64_t row_count;
  const int32_t* columns;
  int64_t column_count;
};

}  // namespace rpg
