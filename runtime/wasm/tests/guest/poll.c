// Waits for stdin for at most 20 ms, says whether there was something, then waits for ever.
#include <poll.h>
#include <string.h>
#include <unistd.h>

static void say(const char *line) { write(1, line, strlen(line)); }

int main(void) {
    struct pollfd p = {.fd = 0, .events = POLLIN};
    say(poll(&p, 1, 20) == 0 ? "nothing\n" : "too soon\n");
    char byte;
    say(poll(&p, 1, -1) == 1 && read(0, &byte, 1) == 1 ? "input\n" : "failed\n");
    return 0;
}
