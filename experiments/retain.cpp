#include <retain/experiments/commands.h>

int main(int argc, char** argv) { return retain::run_program({argv + 1, argv + argc}); }
