#include <retain/experiments/stop_signal.h>

#include <csignal>
#include <initializer_list>

namespace retain {
namespace {

volatile std::sig_atomic_t caught_signal = 0;

}  // namespace

StopSignal::StopSignal() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { caught_signal = signal; };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  for (int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
}

int StopSignal::caught() const { return caught_signal; }

}  // namespace retain
