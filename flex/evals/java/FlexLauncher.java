import java.io.FileInputStream;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.lang.reflect.InvocationTargetException;

/** Calls main of the class args[0]; sends the token on the end channel when it has returned. */
public final class FlexLauncher {
    public static void main(String[] args) throws Throwable {
        byte[] token = new byte[32];
        if (new FileInputStream(FileDescriptor.in).readNBytes(token, 0, 32) != 32) {
            throw new IllegalStateException("no token");
        }
        FileOutputStream end = new FileOutputStream("/dev/fd/3");
        try {
            var method = Class.forName(args[0]).getDeclaredMethod("main", String[].class);
            method.setAccessible(true);
            method.invoke(null, (Object) new String[0]);
        } catch (InvocationTargetException error) {
            Throwable cause = error.getCause();
            if (cause instanceof AssertionError) {
                end.write("wrong".getBytes());
            }
            cause.printStackTrace();
            System.err.println(cause); // last, where the kept end of the text has it
            Runtime.getRuntime().halt(1);
        }
        end.write(token);
    }
}
