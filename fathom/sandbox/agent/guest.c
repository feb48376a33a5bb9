/* The beginning of a virtual machine: this program is /init of the initramfs that we build.
 *
 * It loads the modules that lie beside it, mounts the disk as root, and then either goes on as the
 * agent (a small machine: nothing else ever starts) or hands over to the system's own init (a full
 * machine, in which this program is started again as a service). What the kernel's command line
 * says:
 *
 *   fathom.root=erofs|ext4  fathom.writes=BYTES  fathom.init=PATH  fathom.hostname=NAME
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <net/if.h>
#include <net/route.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#define PORT "fathom.agent"
#define SYSROOT "/sysroot" /* where the system to be is put together */
/* Modules that are wanted later: the tenant's network has no device before a policy allows one. */
#define LATER "/run/fathom/modules"
#define UPPER GUEST_FOLDER "/writes/upper"

enum { PATIENCE = 400, PATIENCE_STEP_US = 10000 };

static void die(const char *what) {
  dprintf(2, "fathom-init: %s: %s\n", what, strerror(errno));
  sync();
  reboot(RB_POWER_OFF);
  _exit(1);
}

static void must_mount(const char *source, const char *target, const char *kind, unsigned long flags,
                       const char *data) {
  mkdir(target, 0755);
  if (mount(source, target, kind, flags, data)) die(target);
}

static int by_name(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Load every module of a folder in the order of the names; the builder has put what others need
 * first. */
static int load_modules(const char *folder) {
  DIR *dir = opendir(folder);
  struct dirent *entry;
  char *names[128];
  size_t count = 0;
  int failed = 0;
  while (dir && count < 128 && (entry = readdir(dir)))
    if (*entry->d_name != '.') names[count++] = strdup(entry->d_name);
  if (dir) closedir(dir);
  qsort(names, count, sizeof *names, by_name);
  for (size_t i = 0; i < count; i++) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, names[i]);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)) failed = errno;
    if (fd >= 0) close(fd);
    free(names[i]);
  }
  return failed;
}

static void copy_file(const char *from, const char *to) {
  char data[65536];
  int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0400);
  ssize_t len;
  while (in >= 0 && out >= 0 && (len = read(in, data, sizeof data)) > 0)
    if (write(out, data, len) != len) die(to);
  if (in >= 0) close(in);
  if (out >= 0) close(out);
}

static void copy_folder(const char *from, const char *to) {
  DIR *dir = opendir(from);
  struct dirent *entry;
  mkdir(to, 0700);
  while (dir && (entry = readdir(dir))) {
    char source[512], target[512];
    if (*entry->d_name == '.') continue;
    snprintf(source, sizeof source, "%s/%.200s", from, entry->d_name);
    snprintf(target, sizeof target, "%s/%.200s", to, entry->d_name);
    copy_file(source, target);
  }
  if (dir) closedir(dir);
}

static void spill(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd >= 0 && write(fd, text, strlen(text)) < 0) errno = 0;
  if (fd >= 0) close(fd);
}

static char *option(const char *line, const char *name) {
  char *found = strstr(line, name);
  if (!found) return NULL;
  found += strlen(name);
  return strndup(found, strcspn(found, " \n"));
}

static void await_file(const char *path) {
  struct stat s;
  for (int i = 0; i < PATIENCE && stat(path, &s); i++) usleep(PATIENCE_STEP_US);
}

/* The port of our name; without udev the kernel's own list has to do. */
int guest_port(void) {
  for (int i = 0; i < PATIENCE; i++, usleep(PATIENCE_STEP_US)) {
    DIR *dir = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int found = -1;
    while (dir && found < 0 && (entry = readdir(dir))) {
      char path[512], name[64] = "";
      snprintf(path, sizeof path, "/sys/class/virtio-ports/%.200s/name", entry->d_name);
      int fd = open(path, O_RDONLY | O_CLOEXEC);
      if (fd < 0) continue;
      ssize_t len = read(fd, name, sizeof name - 1);
      close(fd);
      if (len <= 0 || strncmp(name, PORT, strlen(PORT))) continue;
      snprintf(path, sizeof path, "/dev/%.200s", entry->d_name);
      found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    }
    if (dir) closedir(dir);
    if (found >= 0) return found;
  }
  return -1;
}

static void loopback_up(void) {
  struct ifreq r = {.ifr_name = "lo", .ifr_flags = IFF_UP};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd >= 0) ioctl(fd, SIOCSIFFLAGS, &r), close(fd);
}

/* The image is read-only; what is written lies in memory of a fixed size, in two folders alone. */
static void mount_small_root(const char *writes) {
  char data[256];
  must_mount("/dev/vda", "/base", "erofs", MS_RDONLY | MS_NOSUID | MS_NODEV, NULL);
  unsigned long long size = writes ? strtoull(writes, NULL, 10) : 0;
  snprintf(data, sizeof data, "size=%llu,nr_inodes=%llu,mode=711", size, size / 4096 + 1024);
  must_mount("tmpfs", "/writes", "tmpfs", MS_NOSUID | MS_NODEV, data);
  if (mkdir("/writes/upper", 0755) || mkdir("/writes/work", 0700)) die("writes");
  must_mount("overlay", SYSROOT, "overlay", MS_NOSUID | MS_NODEV,
             "lowerdir=/base,upperdir=/writes/upper,workdir=/writes/work");
  const char *folders[] = {"work", "tmp", "proc", "sys", "dev", "run"};
  for (int i = 0; i < 6; i++) {
    char path[64];
    snprintf(path, sizeof path, SYSROOT "/%s", folders[i]);
    struct stat s;
    /* In an image that somebody made these may be anything, a link to elsewhere included. */
    if (lstat(path, &s)) mkdir(path, 0755);
    else if (!S_ISDIR(s.st_mode)) errno = ENOTDIR, die(path);
  }
  if (chown(SYSROOT "/work", 1000, 1000) || chmod(SYSROOT "/tmp", 01777)) die("work");
  must_mount(SYSROOT "/work", SYSROOT "/work", NULL, MS_BIND, NULL);
  must_mount(SYSROOT "/tmp", SYSROOT "/tmp", NULL, MS_BIND, NULL);
  /* The rest of the root is closed by its owner; this closes it for everybody. */
  if (mount(NULL, SYSROOT, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL))
    die("read-only root");
}

static void enter_small_root(const char *writes) {
  must_mount("proc", SYSROOT "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  must_mount("sysfs", SYSROOT "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL);
  must_mount("devtmpfs", SYSROOT "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=755");
  mkdir(SYSROOT "/dev/pts", 0755);
  must_mount("devpts", SYSROOT "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
             "newinstance,ptmxmode=0666,mode=0620");
  unlink(SYSROOT "/dev/ptmx");
  if (symlink("pts/ptmx", SYSROOT "/dev/ptmx")) die("ptmx");
  /* udev makes these elsewhere; a program that was given a file as /dev/stdin needs them. */
  if (symlink("/proc/self/fd", SYSROOT "/dev/fd") || symlink("fd/0", SYSROOT "/dev/stdin") ||
      symlink("fd/1", SYSROOT "/dev/stdout") || symlink("fd/2", SYSROOT "/dev/stderr"))
    die("standard streams");
  char data[96];
  unsigned long long size = writes ? strtoull(writes, NULL, 10) : 0;
  snprintf(data, sizeof data, "mode=1777,size=%llu", size / 4);
  mkdir(SYSROOT "/dev/shm", 01777);
  must_mount("tmpfs", SYSROOT "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, data);
  must_mount("tmpfs", SYSROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=16m,mode=755");
  mkdir(SYSROOT GUEST_FOLDER, 0700);
  must_mount("/writes", SYSROOT GUEST_FOLDER "/writes", NULL, MS_BIND, NULL);
  copy_folder("/later", SYSROOT LATER);
}

static unsigned long long memory(const char *what) {
  char line[128], form[64];
  unsigned long long kib = 0;
  FILE *f = fopen("/proc/meminfo", "re");
  snprintf(form, sizeof form, "%s: %%llu", what);
  while (f && fgets(line, sizeof line, f) && sscanf(line, form, &kib) != 1) {
  }
  if (f) fclose(f);
  if (!kib) die("/proc/meminfo");
  return kib * 1024;
}

static const char *group_folder;

/* The path of a file of the commands' group; valid until the next call. */
const char *guest_group(const char *file) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", group_folder ? group_folder : "/nonexistent", file);
  return path;
}

/* Commands share a group that is smaller than what is free: a machine without any memory throws out
 * the programs that it runs, and reads them again, for minutes. */
static void make_group(const char *folder, unsigned long long limit) {
  char text[32];
  if (mkdir(folder, 0700) && errno != EEXIST) return;
  group_folder = folder;
  snprintf(text, sizeof text, "%llu", limit);
  spill(guest_group("memory.max"), text);
}

/* As a service of a full system, whose own groups are its first process's. */
void guest_serve(void) {
  make_group("/sys/fs/cgroup/fathom", memory("MemTotal") / 4 * 3);
}

static unsigned long long budget;

static int read_one(const char *path, const struct stat *s, int kind, struct FTW *at) {
  static char data[65536];
  (void)at;
  if (kind != FTW_F || (unsigned long long)s->st_size > budget) return 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  while (fd >= 0 && read(fd, data, sizeof data) > 0) {
  }
  if (fd >= 0) close(fd);
  budget -= s->st_size;
  return 0;
}

/* Programs that are read now are charged to nobody's group. Read by commands first, they would be
 * thrown out and read again, over and over, where those run out of memory. */
static void read_programs(void) {
  const char *folders[] = {"/usr/bin", "/usr/lib"};
  budget = 40 << 20;
  for (int i = 0; i < 2; i++) nftw(folders[i], read_one, 8, FTW_PHYS | FTW_MOUNT);
}

static void switch_root(void) {
  if (chdir(SYSROOT) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
    die("new root");
}

/* As the first process of an initramfs: bring the machine up. Returns the agent's port in a small
 * machine; in a full one this process becomes the system's init. */
int guest_start(int *journal) {
  char line[4096] = "";
  must_mount("proc", "/proc", "proc", 0, NULL);
  must_mount("sysfs", "/sys", "sysfs", 0, NULL);
  must_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
  int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
  if (fd < 0 || read(fd, line, sizeof line - 1) < 0) die("command line");
  close(fd);
  if (strstr(line, "fathom.probe")) {
    /* Whether a guest runs at all was the question. */
    spill("/dev/ttyS0", "fathom-guest-ran\n");
    reboot(RB_AUTOBOOT);
  }
  int failed = load_modules("/modules");
  if (failed) errno = failed, die("modules");
  await_file("/dev/vda");
  char *init = option(line, "fathom.init="), *writes = option(line, "fathom.writes=");
  char *hostname = option(line, "fathom.hostname=");
  if (hostname && sethostname(hostname, strlen(hostname))) die("hostname");
  if (init) {
    must_mount("/dev/vda", SYSROOT, "ext4", 0, NULL);
    must_mount("tmpfs", SYSROOT "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
    mkdir(SYSROOT GUEST_FOLDER, 0700);
    copy_folder("/later", SYSROOT LATER);
    copy_file("/init", SYSROOT GUEST_FOLDER "/agent");
    chmod(SYSROOT GUEST_FOLDER "/agent", 0700);
    const char *keep[] = {"/proc", "/sys", "/dev"};
    for (int i = 0; i < 3; i++) umount2(keep[i], MNT_DETACH);
    switch_root();
    execl(init, init, (char *)NULL);
    die(init);
  }
  loopback_up();
  spill("/proc/sys/kernel/dmesg_restrict", "1");
  spill("/proc/sys/kernel/kptr_restrict", "2");
  spill("/proc/sys/kernel/unprivileged_bpf_disabled", "1");
  spill("/proc/sys/kernel/core_pattern", "");
  spill("/proc/sys/user/max_user_namespaces", "0");
  mount_small_root(writes);
  enter_small_root(writes);
  switch_root();
  read_programs();
  must_mount("cgroup2", GUEST_FOLDER "/group", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  spill(GUEST_FOLDER "/group/cgroup.subtree_control", "+memory +pids");
  make_group(GUEST_FOLDER "/group/tenant",
             memory("MemFree") - memory("MemTotal") / 16 - (4 << 20));
  *journal = open(GUEST_FOLDER "/journal", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  int port = guest_port();
  if (port < 0) errno = ENODEV, die(PORT);
  return port;
}

/* The network ----------------------------------------------------------------------------------- */

static int set_address(int fd, struct ifreq *r, unsigned long request, const char *text) {
  struct sockaddr_in *a = (struct sockaddr_in *)&r->ifr_addr;
  *a = (struct sockaddr_in){.sin_family = AF_INET};
  return inet_pton(AF_INET, text, &a->sin_addr) == 1 ? ioctl(fd, request, r) : -1;
}

/* Turn the machine's one network device on or off. Where its address and its gateway are is the
 * emulator's choice. Returns an error number. */
int guest_network(bool on) {
  struct ifreq r = {0};
  int failed = 0;
  if (on) failed = load_modules(LATER);
  if (failed) return failed;
  DIR *dir = NULL;
  for (int i = 0; i < PATIENCE && !*r.ifr_name; i++) {
    struct dirent *entry;
    dir = opendir("/sys/class/net");
    while (dir && (entry = readdir(dir)))
      if (*entry->d_name != '.' && strcmp(entry->d_name, "lo"))
        snprintf(r.ifr_name, sizeof r.ifr_name, "%.15s", entry->d_name);
    if (dir) closedir(dir);
    if (!on) break;
    if (!*r.ifr_name) usleep(PATIENCE_STEP_US);
  }
  if (!*r.ifr_name) return on ? ENODEV : 0;
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  r.ifr_flags = on ? IFF_UP : 0;
  if (on) {
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct sockaddr_in *gateway = (struct sockaddr_in *)&route.rt_gateway;
    route.rt_dst.sa_family = route.rt_genmask.sa_family = AF_INET;
    gateway->sin_family = AF_INET;
    inet_pton(AF_INET, "10.0.2.2", &gateway->sin_addr);
    if (set_address(fd, &r, SIOCSIFADDR, "10.0.2.15") ||
        set_address(fd, &r, SIOCSIFNETMASK, "255.255.255.0"))
      failed = errno;
    r.ifr_flags = IFF_UP;
    if (!failed && ioctl(fd, SIOCSIFFLAGS, &r)) failed = errno;
    if (!failed && ioctl(fd, SIOCADDRT, &route) && errno != EEXIST) failed = errno;
  } else if (ioctl(fd, SIOCSIFFLAGS, &r)) {
    failed = errno;
  }
  close(fd);
  return failed;
}
