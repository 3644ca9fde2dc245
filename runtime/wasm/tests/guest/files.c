// Each argument is an action and a path: w writes "data" to a new file, r prints a file,
// u sets its times, l lists a directory, c changes the working directory. Prints errno's text.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// Of the compiler's runtime library, which is not linked, this alone is needed, for a time stamp.
__int128 __muloti4(__int128 a, __int128 b, int *overflow) {
    *overflow = 0;
    return (long long)a * (long long)b;
}

static int act(char action, const char *path) {
    char buffer[4096];
    int fd;
    ssize_t n;
    DIR *dir;
    switch (action) {
    case 'w':
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
        return fd < 0 || write(fd, "data\n", 5) != 5 || close(fd) ? -1 : 0;
    case 'r':
        fd = open(path, O_RDONLY);
        if (fd < 0) return -1;
        while ((n = read(fd, buffer, sizeof buffer)) > 0) write(1, buffer, n);
        return n < 0 ? -1 : close(fd);
    case 'm':
        fd = open(path, O_RDWR);
        return fd < 0 ? -1 : close(fd);
    case 'u':
        return utimensat(AT_FDCWD, path, (struct timespec[]){{1, 0}, {2, 0}}, 0);
    case 'l':
        dir = opendir(path);
        return dir && readdir(dir) ? closedir(dir) : -1;
    case 'c':
        return chdir(path);
    default:
        errno = EINVAL;
        return -1;
    }
}

int main(int argc, char **argv) {
    int failed = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (act(argv[i][0], argv[i + 1]) == 0) continue;
        fprintf(stderr, "%s %s: %s\n", argv[i], argv[i + 1], strerror(errno));
        failed = 1;
    }
    return failed;
}
