// Writes until it fails and exits with errno; EPIPE is 64 in preview 1.
#include <errno.h>
#include <unistd.h>

int main(void) {
    while (write(1, "y\n", 2) > 0) {}
    return errno;
}
