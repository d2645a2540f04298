// Which shared memory each thread accessed, and from which line of a kernel's source: what tests
// count conflicts between banks from.

#pragma once

#include <vector>

namespace rpg::simt {

// A place in a kernel's source; as a default argument, that of the caller.
struct Site {
  const char* file;
  int line;
  Site(const char* at_file = __builtin_FILE(), int at_line = __builtin_LINE())
      : file(at_file), line(at_line) {}
};

// An access by one thread.
struct Access {
  Site site;
  int cta, thread, offset, bytes;
};

// While it is not null, accesses of this host thread's launches go there.
extern thread_local std::vector<Access>* accesses;

void write_down(const void* address, int bytes, const Site& site);

inline void note(const void* address, int bytes, const Site& site) {
  if (accesses) write_down(address, bytes, site);
}

}  // namespace rpg::simt
