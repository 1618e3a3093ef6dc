#pragma once

#include <string>

namespace retain {

/// From its construction on, SIGINT and SIGTERM no longer end the process: they ask it to stop at
/// the next good moment. A second one of the same kind ends it at once.
class StopSignal {
 public:
  StopSignal();
  int caught() const;  ///< The signal's number; 0 = none yet.
};

/// Thrown when a command stops on a signal, with everything saved.
struct Stopped {
  int signal;
  std::string message;
};

}  // namespace retain
